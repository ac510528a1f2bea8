"""Prompts' embeddings on a disk: what one start has encoded, the next ones read.

folder/embeddings-<fingerprint>/facts.json      what the embeddings were made with
                               /ab/<text>.safetensors   a text's embeddings, named by its SHA-256, with a hash of all
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from flowalign.models.encoding import Embedding
from flowalign.models.fingerprints import add_tensor
from flowalign.tracking import write_atomically

NAMES = ("prompt_embeds", "pooled_prompt_embeds", "prompt_mask")  # of an `Embedding`'s kinds
SEAL = "seal"  # the tensor that holds the hash of the others


class EmbeddingStore:
    """Embeddings by text, in a folder of their own for all that they depend on.

    Each is in a file of its own, in the dtype that the encoders gave it, and comes back to the last bit. Files appear
    whole or not at all, so that many processes, on one machine or several, can read and write at once; what two of them
    encode at the same time is written twice. A file that is cut short, altered or another text's is told in one line
    and counts as missing. Where all that is asked for is there, the folder may be read-only.

    Args:
        folder: of all stores, made if it is not there.
        facts: all that an embedding depends on, besides its text.

    Raises: OSError where the folder can be neither found nor made.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any]) -> None:
        self.name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        self.folder = folder / f"embeddings-{self.name[:16]}"
        if not (self.folder / "facts.json").is_file():
            self._write(self.folder / "facts.json", json.dumps(facts, indent=1).encode())

    def path(self, text: str) -> Path:
        """Where a text's embeddings are, or will be."""
        name = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"

    def read(self, text: str) -> Embedding | None:
        """A text's embeddings, None where they are not there as they were written."""
        path = self.path(text)
        try:
            found = load(path.read_bytes())
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError) as error:
            _tell(path, f"cannot be read ({error})")
            return None
        seal, row = found.pop(SEAL, None), tuple(found.get(name) for name in NAMES)
        if seal is None or seal.tolist() != [*self._seal(text, row)]:
            _tell(path, "has been altered, or is another text's")
            return None
        return row

    def write(self, text: str, row: Embedding) -> None:
        """Keep a text's embeddings.

        Raises: OSError, with the reason, where they cannot be written.
        """
        seal = torch.tensor([*self._seal(text, row)], dtype=torch.uint8)
        kinds = {name: one.contiguous() for name, one in zip(NAMES, row, strict=True) if one is not None}
        self._write(self.path(text), save({**kinds, SEAL: seal}))

    def _seal(self, text: str, row: Embedding) -> bytes:
        """A hash of the store's name, the text and all tensors."""
        digest = hashlib.sha256(f"{self.name} ".encode() + text.encode(errors="surrogatepass"))
        for name, one in zip(NAMES, row, strict=True):
            if one is not None:
                add_tensor(digest, name, one)
        return digest.digest()

    def _write(self, path: Path, content: bytes) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, content)
        except OSError as error:
            raise OSError(
                f"embeddings cannot be kept in {self.folder} ({error.strerror or error}): make room there, name "
                "another folder, or keep none (model.embeddings, pairs.embeddings)"
            ) from error


def entries(folder: Path) -> int:
    """How many texts a store's folder has embeddings of."""
    return sum(1 for _ in folder.glob("??/*.safetensors"))


def _tell(path: Path, problem: str) -> None:
    print(f"flowalign: {path} {problem}; encoded again", file=sys.stderr, flush=True)
