"""Pairs as latents: each medium passes the model's VAE once, and a second start reads what the first has written."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from flowalign.config import dotted_name
from flowalign.distributed import on_main, rank, share, together, world_size
from flowalign.fitting import Fit, centre_crop, fitted
from flowalign.models.base import Model
from flowalign.models.fingerprints import add_weights
from flowalign.models.pipeline import PipelineModel
from flowalign.preferences.opening import open_pair
from flowalign.preferences.records import Medium, Preference
from flowalign.preferences.shards import Shard
from flowalign.preferences.sources import REASONS, LeftOut, OnBad, PreferenceData, as_preferences
from flowalign.progress import Progress
from flowalign.records import Prompts, Size
from flowalign.tracking import write_atomically

CODE = 2  # raise it where the same media would give other latents, or the same rows another record
TOLD = 200  # pieces that are looked at between two lines which say so: some 30 GB at 1024 pixels
KEPT = 128  # records of pieces that stay in memory, some 60 MB; each read costs milliseconds
SIGNS = {"first": 1, "second": -1, "tie": 0, "invalid": 0}
DTYPES = {"float32": torch.float32, "float16": torch.float16}


@dataclass(frozen=True)
class PairBatch:
    """Pairs of one size, as the model's latents at sigma 0, on the CPU.

    sign: 1 where the first is preferred, -1 where the second is, 0 for ties and what is not valid. valid: whether it is
    known what is preferred, ties among it. margin, scores: nan where there are none. weight: at least 0.
    """

    prompts: Prompts
    first: Float[Tensor, b * d]
    second: Float[Tensor, b * d]
    sign: Int[Tensor, " b"]
    valid: Bool[Tensor, " b"]
    margin: Float[Tensor, " b"]
    scores: Float[Tensor, "b 2"]
    weight: Float[Tensor, " b"]

    def __len__(self) -> int:
        return len(self.sign)

    def ordered(self) -> tuple[Float[Tensor, b * d], Float[Tensor, b * d]]:
        """The preferred and the other one of each pair; of undecided ones as they stand."""
        swap = (self.sign < 0).view(-1, *(1,) * (self.first.ndim - 1))
        return self.second.where(swap, self.first), self.first.where(swap, self.second)


class PairLatents:
    """Preferences as latents of a model, in a folder that is filled once.

    What is in it depends on the preferences, the VAE and its precision, the model's size, and the arguments but
    batch_size; for each of these the folder has another folder. Files that preferences name count by name and size.
    Many processes share the work, each writing pieces of its own, and must see the same folder. A start that was
    interrupted goes on; a piece that is damaged is made again, with a line that says so.

    Args:
        model: with its VAE, and the size that all media get.
        preferences: a set, or a file or folder that `Preferences` takes, with this on_bad.
        folder: of all caches.
        fit: how media get the model's size: `fitting.centre_crop` or `.stretch`.
        most_enlarged: how many times a side may be enlarged.
        on_bad: stop at the first pair that cannot be had, or skip such, counted and told.
        batch_size: media in a call of the VAE.
        pairs_per_shard: pairs in a piece.
        precision: that latents are kept in.

    Raises: ValueError that names file and row, as `open_pair` and `fitted` do.
    """

    def __init__(
        self,
        model: Model,
        preferences: PreferenceData,
        folder: str,
        fit: Fit = centre_crop,
        most_enlarged: float = 2.0,
        on_bad: OnBad = "stop",
        batch_size: int = 8,
        pairs_per_shard: int = 128,
        precision: Literal["float32", "float16"] = "float32",
    ) -> None:
        if batch_size < 1 or pairs_per_shard < 1:
            raise ValueError(f"batch_size and pairs_per_shard must be at least 1, got {batch_size}, {pairs_per_shard}")
        self.preferences, self.model = as_preferences(preferences, on_bad), model
        self.fit, self.on_bad = fit, on_bad
        self.most_enlarged, self.batch_size, self.dtype = most_enlarged, batch_size, DTYPES[precision]
        self.size = model_size(model)
        facts = {"code": CODE, "preferences": self.preferences.fingerprint(), "encoder": encoder_fingerprint(model)}
        facts |= {"size": asdict(self.size), "fit": dotted_name(fit), "most_enlarged": most_enlarged}
        facts |= {"on_bad": on_bad, "pairs_per_shard": pairs_per_shard, "precision": precision}
        self.name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        self.folder = Path(folder) / self.name[:16]
        on_main(lambda: self._begin(facts))
        total = len(self.preferences)
        self.parts = [range(start, min(start + pairs_per_shard, total)) for start in range(0, total, pairs_per_shard)]
        together(self._fill)
        self.shard = lru_cache(maxsize=KEPT)(lambda number: Shard(self.folder, number))
        self._look()

    def _begin(self, facts: dict[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / "facts.json", json.dumps(facts, indent=1).encode())

    def _fill(self) -> None:
        """Make the pieces of this process that are not there, or not as they were written."""
        mine = share(len(self.parts), rank(), world_size())
        missing = [number for number in mine if not self._stands(number)]
        if not missing:
            return
        total = sum(len(self.parts[number]) for number in mine)
        progress = Progress(total, done=total - sum(len(self.parts[number]) for number in missing))
        for number in missing:
            self._make(number, progress)
        progress.close()

    def _stands(self, number: int) -> bool:
        """Whether a piece is there as it was written; one that is not any more is told."""
        problem = Shard(self.folder, number).problem()
        if problem:
            print(f"flowalign: {self.folder}: {problem}; made again", file=sys.stderr, flush=True)
        if rank() == 0 and number % TOLD == TOLD - 1:
            told = f"looked at {number + 1} of {len(self.parts)} pieces of latents in {self.folder}"
            print(f"flowalign: {told}", file=sys.stderr, flush=True)
        return problem is None

    def _make(self, number: int, progress: Progress) -> None:
        """One piece: its media as latents, each once."""
        queue, left_out = Queue(self.model, self.batch_size), LeftOut()
        rows, pairs = list[dict[str, Any]](), list[list[int]]()
        for preference in self.preferences.rows(self.parts[number]):
            pixels = self._pixels(preference, left_out)
            if pixels is not None:
                pairs.append([queue.put(preference.first, pixels[0]), queue.put(preference.second, pixels[1])])
                rows.append(_row(preference))
            progress.update(2, {})
        latents = queue.finish().to(self.dtype)
        index = torch.tensor(pairs, dtype=torch.int64).view(-1, 2)
        Shard(self.folder, number).write(latents, index, rows, queue.files, asdict(left_out))

    def _pixels(self, preference: Preference, left_out: LeftOut) -> tuple[Tensor, Tensor] | None:
        """A pair's media at the model's size; None where it is left out."""
        try:
            media = open_pair(preference)
            size, fit, most = self.size, self.fit, self.most_enlarged
            return fitted(media.first, size, fit, most), fitted(media.second, size, fit, most)
        except ValueError as error:
            text = str(error) if str(error).startswith(preference.where) else f"{preference.where}: {error}"
            if self.on_bad == "stop":
                raise ValueError(text) from error
            left_out.add(text)
            return None

    def _look(self) -> None:
        """Piece and place of each pair, and what of it is known without its latents; what was left out is told.

        signs, valid, weights and scores are those of `PairBatch`, for all pairs.
        """
        places, rows, left_out = list[tuple[int, int]](), list[tuple[str, float, Any]](), LeftOut()
        for number in range(len(self.parts)):
            told = Shard(self.folder, number).told
            places += [(number, place) for place in range(len(told["rows"]))]
            rows += [(row["label"], row["weight"], row["scores"]) for row in told["rows"]]
            left_out.count += told["left_out"]["count"]
            left_out.reasons += told["left_out"]["reasons"][: REASONS - len(left_out.reasons)]
        left_out.tell(len(self.preferences), "preferences")
        if not places:
            raise ValueError(f"no preference can be used: {'; '.join(left_out.reasons)}")
        self.left_out, nan = left_out, float("nan")
        labels, weights, scores = zip(*rows, strict=True)
        self._places = np.array(places, dtype=np.int32)
        self.signs = np.array([SIGNS[label] for label in labels], dtype=np.int8)
        self.valid = np.array([label != "invalid" for label in labels])
        self.weights = np.array(weights, dtype=np.float32)
        self.scores = np.array([one or (nan, nan) for one in scores], dtype=np.float32)

    def __len__(self) -> int:
        return len(self._places)

    def fingerprint(self) -> str:
        """Tells these latents from any other."""
        return f"{len(self)} pairs of latents, {self.name}"

    def prompts(self, index: Sequence[int]) -> Prompts:
        """The prompts of pairs, without their latents."""
        told = [self.shard(int(piece)).told["rows"][place] for piece, place in self._places[[*index]]]
        return Prompts(tuple(row["prompt"] for row in told), tuple(row["metadata"] for row in told))

    def rows(self, index: Sequence[int]) -> PairBatch:
        """The chosen pairs, in the order given. Raises: ValueError where a piece cannot be read any more."""
        chosen = self._places[[*index]].tolist()
        held: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        for piece in dict.fromkeys(piece for piece, _ in chosen):
            places = [place for one, place in chosen if one == piece]
            held |= zip(((piece, place) for place in places), self.shard(piece).latents(places), strict=True)
        told = [self.shard(piece).told["rows"][place] for piece, place in chosen]
        first, second = zip(*(held[piece, place] for piece, place in chosen), strict=True)
        nan = float("nan")
        return PairBatch(
            Prompts(tuple(row["prompt"] for row in told), tuple(row["metadata"] for row in told)),
            torch.stack(first),
            torch.stack(second),
            torch.tensor([SIGNS[row["label"]] for row in told]),
            torch.tensor([row["label"] != "invalid" for row in told]),
            torch.tensor([nan if row["margin"] is None else row["margin"] for row in told]),
            torch.tensor([row["scores"] or (nan, nan) for row in told]),
            torch.tensor([row["weight"] for row in told]),
        )


class Queue:
    """Media on their way through the VAE, in calls of one shape; each is encoded once."""

    def __init__(self, model: Model, batch_size: int) -> None:
        self.model, self.batch_size = model, batch_size
        self.known: dict[Path, int] = {}
        self.files: dict[str, int] = {}
        self.waiting: list[Tensor] = []
        self.made: list[Tensor] = []

    def put(self, medium: Medium, pixels: Float[Tensor, "*frames 3 h w"]) -> int:
        """The number that the medium's latents will have."""
        if medium.path not in self.known:
            self.known[medium.path] = len(self.known)
            if medium.data is None:
                self.files[str(medium.path)] = medium.path.stat().st_size
            self.waiting.append(pixels)
            if len(self.waiting) == self.batch_size:
                self._encode()
        return self.known[medium.path]

    def _encode(self) -> None:
        some = self.waiting + [self.waiting[-1]] * (self.batch_size - len(self.waiting))
        self.made.append(self.model.encode_media(torch.stack(some)).cpu()[: len(self.waiting)])
        self.waiting = []

    def finish(self) -> Float[Tensor, m * d]:
        """The latents of all of them."""
        if self.waiting:
            self._encode()
        return torch.cat(self.made) if self.made else torch.zeros(0, *self.model.latent_shape)


def model_size(model: Model) -> Size:
    """The size of what a model makes where nothing else is asked. Raises: ValueError where it does not tell."""
    size = model.media_size(Size())
    if size.height is None or size.width is None:
        raise ValueError(f"{type(model).__name__} does not say which height and width its media have")
    return size


def encoder_fingerprint(model: Model) -> str:
    """Tells what a model makes latents with: the family, and its VAE's weights, config and precision."""
    digest = hashlib.sha256(type(model).__name__.encode())
    if isinstance(model, PipelineModel):
        vae = model.pipeline.vae
        told = {name: value for name, value in vae.config.items() if not name.startswith("_")}
        digest.update(f"{sorted(told.items())} {vae.dtype} {model._decode_autocast}".encode())
        add_weights(digest, vae)
    return digest.hexdigest()


def _row(preference: Preference) -> dict[str, Any]:
    names = ("prompt", "metadata", "label", "margin", "scores", "weight", "where")
    return {name: getattr(preference, name) for name in names}
