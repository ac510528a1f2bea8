"""Pieces of a cache of latents: tensors in safetensors, and beside them, written last, what they are and their hash.

00000.safetensors   latents [m, *d] of distinct media; pairs [n, 2], which of them each pair is
00000.json          sizes of the files they were made of, what each pair says, and what was left out
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from flowalign.tracking import write_atomically


@dataclass(frozen=True)
class Shard:
    """One of a cache's pieces, where it is or will be."""

    folder: Path
    number: int

    @property
    def tensors(self) -> Path:
        """The file of tensors."""
        return self.folder / f"{self.number:05d}.safetensors"

    @property
    def record(self) -> Path:
        """The file that says what they are."""
        return self.folder / f"{self.number:05d}.json"

    @cached_property
    def told(self) -> dict[str, Any]:
        """The record; call `problem` first."""
        return dict(json.loads(self.record.read_bytes()))

    def write(
        self,
        latents: Float[Tensor, m * d],
        pairs: Int[Tensor, "n 2"],
        rows: Sequence[dict[str, Any]],
        files: dict[str, int],
        left_out: dict[str, Any],
    ) -> None:
        """Write the piece; a kill before the end leaves none, or the old one."""
        content = save({"latents": latents.contiguous(), "pairs": pairs.contiguous()})
        digest = hashlib.sha256(content).hexdigest()
        self.record.unlink(missing_ok=True)
        write_atomically(self.tensors, content)
        told = {"bytes": len(content), "sha256": digest, "files": files, "left_out": left_out, "rows": list(rows)}
        write_atomically(self.record, json.dumps(told, default=str).encode())

    def problem(self) -> str | None:
        """What is wrong with it; "" where it was not written to its end, None where all is well."""
        if not self.record.is_file():
            return ""
        try:
            told = json.loads(self.record.read_bytes())
            size, digest, files = told["bytes"], told["sha256"], dict(told["files"])
            labels = [row["label"] for row in told["rows"]]
        except (ValueError, KeyError, TypeError):
            return f"{self.record.name} is cut short or altered"
        if not self.tensors.is_file():
            return f"{self.tensors.name} is missing"
        if self.tensors.stat().st_size != size:
            return f"{self.tensors.name} has {self.tensors.stat().st_size} bytes, not {size}"
        with self.tensors.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                return f"{self.tensors.name} has changed (SHA-256 differs)"
        for name, known in files.items():
            if Path(name).is_file() and Path(name).stat().st_size != known:
                return f"{name} has changed since"
        return None if all(isinstance(label, str) for label in labels) else f"{self.record.name} is altered"

    def latents(self, places: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """The latents of pairs, float32.

        Raises: ValueError where the file cannot be read any more.
        """
        try:
            with safe_open(self.tensors, "pt") as file:
                pairs, held = file.get_tensor("pairs"), file.get_slice("latents")
                both = [[held[int(i) : int(i) + 1][0].to(torch.float32) for i in pairs[place]] for place in places]
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self.tensors} cannot be read: {error}; start again to have it rebuilt") from error
        return [(first, second) for first, second in both]
