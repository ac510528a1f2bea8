"""What a sweep has drawn and scored, on the disk, by the content that it was made from.

    drawn/KEY/00000.png ...   a call's media; of a video 00000.zip with its frames and 00000.mp4 to look at
    drawn/KEY/call.json       digests of the media and what they have cost; written last: a call with it is done
    scores/KEY.json           a reward's scores of a call, by the reward and the digests of the media
    prices.json, digests.json what drawing costs, and files that were read

Several sweeps may share such a folder, and several processes write into it: equal keys have equal content.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from flowalign.accounting import Rows
from flowalign.evaluation.facts import Digests, content, key_of
from flowalign.evaluation.methods import Drawn, Price
from flowalign.media import FILES, load
from flowalign.pictures import to_images, unzipped, zipped
from flowalign.records import Prompts, Scores
from flowalign.tracking import environment, write_atomically
from flowalign.videos import mp4
from trainers.search_cost import Prices, Spent

SAMPLER = 1  # raise it where the same settings would draw other pictures
SCORER = 1  # raise it where the same rewards would be shown something else
DRAWN_BY = ("negative_prompt", "height", "width", "frames", "seed", "image", "strength")  # of a prompt's record
CALL = "call.json"


@dataclass(frozen=True)
class Kept:
    """A call that is done. digests: of its media, None where there is none."""

    key: str
    digests: tuple[str | None, ...]
    spent: Spent
    seconds: float
    fps: float | None


@dataclass(frozen=True)
class Column:
    """Scores of a call's prompts; nan where there is none. parts: by name, the total under "total"."""

    parts: Mapping[str, tuple[float, ...]]


def draw_key(model: Any, method: Any, prompts: Prompts, seed: int, whole: bool, digests: Digests) -> str:
    """Of a call's media.

    whole: all of the prompts' records count, as a search's reward reads them; else what a model looks at.
    """
    rows = [{k: v for k, v in row.items() if whole or k in DRAWN_BY} for row in prompts.metadata]
    return key_of([SAMPLER, model, method, list(prompts.text), with_content(rows, digests), seed])


def score_key(reward: Any, media: Sequence[str | None], prompts: Prompts, fps: float | None, digests: Digests) -> str:
    """Of a reward's scores of media, by their digests."""
    rows = with_content(prompts.metadata, digests)
    return key_of([SCORER, reward, list(media), list(prompts.text), rows, fps])


def with_content(rows: Sequence[Mapping[str, Any]], digests: Digests) -> list[dict[str, Any]]:
    """Prompts' records, with what is in the files that they name in place of these."""
    return [{name: _content(value, digests) if name in FILES else value for name, value in row.items()} for row in rows]


def _content(value: Any, digests: Digests) -> Any:
    if isinstance(value, list):
        return [_content(one, digests) for one in value]
    return content(value, digests) if isinstance(value, str) else value


class Store:
    """The folder of what is done."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.digests = folder, Digests(folder / "digests.json")

    def open(self) -> None:
        """Make the folder. Raises: OSError where it cannot be written."""
        for name in ("drawn", "scores"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)

    def drawn(self, key: str) -> Kept | None:
        """A call, if it is done."""
        told = read_object(self.folder / "drawn" / key / CALL)
        if told is None:
            return None
        try:
            rows = {name: Rows(**value) for name, value in told["spent"].items()}
            digests = tuple(told["digests"])
            here = all(self.picture(key, i).is_file() for i, digest in enumerate(digests) if digest)
            return Kept(key, digests, Spent(**rows), float(told["seconds"]), told["fps"]) if here else None
        except (KeyError, TypeError, ValueError):
            return None  # another version's: it is drawn again

    def keep(self, key: str, drawn: Drawn, prompts: Prompts, fps: float | None) -> None:
        """Write a call, what says that it is done last. Raises: OSError, with the reason, where that cannot be done."""
        folder = self.folder / "drawn" / key
        digests = [None if media is None else digest_of(media) for media in drawn.media]
        told = {"prompts": list(prompts.text), "digests": digests, "spent": asdict(drawn.spent)}
        told |= {"seconds": round(drawn.seconds, 3), "fps": fps, "made_with": environment()}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for i, media in enumerate(drawn.media):
                if media is not None:
                    self._write(folder, i, media, fps)
            write_atomically(folder / CALL, json.dumps(told).encode())
        except OSError as error:
            raise OSError(_unkept(self.folder, error)) from error

    def _write(self, folder: Path, number: int, media: UInt8[Tensor, "*frames 3 h w"], fps: float | None) -> None:
        if media.ndim == 3:
            buffer = BytesIO()
            to_images(media[None] / 255)[0].save(buffer, "PNG")
            write_atomically(folder / f"{number:05d}.png", buffer.getvalue())
            return
        write_atomically(folder / f"{number:05d}.zip", zipped(media, len(media)))
        if fps is not None and not (media.shape[-1] % 2 or media.shape[-2] % 2):
            write_atomically(folder / f"{number:05d}.mp4", mp4(media, fps))

    def picture(self, key: str, number: int) -> Path:
        """Where a call's picture, or a video's frames, are."""
        picture = self.folder / "drawn" / key / f"{number:05d}.png"
        return picture if picture.is_file() else picture.with_suffix(".zip")

    def shown(self, key: str, number: int) -> Path:
        """What of it a page shows: the picture, or the video that plays if there is one."""
        path = self.picture(key, number)
        film = path.with_suffix(".mp4")
        return film if path.suffix == ".zip" and film.is_file() else path

    def media(self, kept: Kept, rows: Sequence[int]) -> Float[Tensor, "b *frames 3 h w"]:
        """Some of a call's media in [0, 1], as they were drawn but for the 8 bits.

        Raises: ValueError for a file that is no longer what was drawn.
        """
        found = [_load(self.picture(kept.key, i)) for i in rows]
        for i, pixels in zip(rows, found, strict=True):
            if digest_of((pixels * 255).round().byte()) != kept.digests[i]:
                path = self.picture(kept.key, i)
                raise ValueError(
                    f"{path} is not what was drawn; remove the folder {path.parent}, and it is drawn again"
                )
        return torch.stack(found)

    def scores(self, key: str) -> Column | None:
        """A call's scores, if they are there."""
        told = read_object(self.folder / "scores" / f"{key}.json")
        if told is None or not told:
            return None
        return Column({name: tuple(math.nan if x is None else float(x) for x in row) for name, row in told.items()})

    def keep_scores(self, key: str, column: Column) -> None:
        """Write a call's scores."""
        told = {name: [x if math.isfinite(x) else None for x in row] for name, row in column.parts.items()}
        try:
            write_atomically(self.folder / "scores" / f"{key}.json", json.dumps(told).encode())
        except OSError as error:
            raise OSError(_unkept(self.folder, error)) from error

    def prices(self, key: str) -> Price | None:
        """What drawing costs, if that is known."""
        told = (read_object(self.folder / "prices.json") or {}).get(key)
        return None if told is None else Price(Prices(**told["prices"]), int(told["rows"]), float(told["cost"]))

    def keep_price(self, key: str, price: Price) -> None:
        """Write it; of several processes one at a time."""
        known = read_object(self.folder / "prices.json") or {}
        write_atomically(self.folder / "prices.json", json.dumps(known | {key: asdict(price)}, indent=1).encode())


def _unkept(folder: Path, error: OSError) -> str:
    told = error.strerror or error
    return f"nothing can be kept in {folder} ({told}): make room there, and the same command goes on"


def read_object(path: Path) -> dict[str, Any] | None:
    """A JSON object; None where there is none, or a broken one."""
    try:
        told = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return told if isinstance(told, dict) else None


def digest_of(media: UInt8[Tensor, "*frames 3 h w"]) -> str:
    """Of media in 8 bits, by their shape and content."""
    content = np.ascontiguousarray(media.cpu().numpy())
    return sha256(f"{content.shape} ".encode() + content.tobytes()).hexdigest()[:24]


def _load(path: Path) -> Float[Tensor, "*frames 3 h w"]:
    if path.suffix != ".zip":
        return load(path)[0]
    from zipfile import ZipFile

    with ZipFile(path) as file:
        count = len(file.namelist())
    return torch.stack(unzipped(path, count))


def column(scores: Scores, rows: Sequence[int], count: int) -> Column:
    """The scores of some of a call's `count` prompts, nan for the others and where one is not valid."""
    known = scores.valid.cpu()
    made = {}
    for name, values in {**scores.parts, "total": scores.total}.items():
        held = values.detach().float().cpu().where(known, torch.nan).tolist()
        whole = [math.nan] * count
        for row, value in zip(rows, held, strict=True):
            whole[row] = value
        made[name] = tuple(whole)
    return Column(made)
