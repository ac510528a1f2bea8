"""`flowalign score`: files of pictures and videos through a reward, as a table, JSON lines and a contact sheet."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from flowalign.media import PICTURES, VIDEOS, load, shown
from flowalign.pictures import grid
from flowalign.progress import Progress
from flowalign.records import Media, Prompts, Scores
from flowalign.tracking import json_lines, write_atomically
from rewards.base import Reward
from rewards.joined import join_scores

_log = logging.getLogger("flowalign")
SHEET = 64  # pictures on the contact sheet: the best and the worst


@dataclass(frozen=True)
class Item:
    """A file and what it should show."""

    path: Path
    prompt: str
    metadata: dict[str, Any]


def find(paths: Sequence[Path]) -> list[Path]:
    """The media files among and in these, folders with all that is below them, in the order of names.

    Raises: ValueError for a path that is not there, or holds none.
    """
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise ValueError(f"{path} does not exist; --media takes pictures, videos and folders of them")
        inside = sorted(one for one in path.rglob("*") if one.is_file()) if path.is_dir() else [path]
        known = [one for one in inside if one.suffix.lower() in PICTURES + VIDEOS]
        if not known:
            raise ValueError(f"{path} holds no picture or video ({', '.join(PICTURES + VIDEOS)})")
        found += known
    return list(dict.fromkeys(found))


def pair(files: Sequence[Path], prompts: Prompts | None) -> list[Item]:
    """Each file with its prompt.

    One prompt is for all files. Prompts with a "file" in their metadata go to the file of that name; else they go to
    the files in their order. Without prompts, a file's prompt is what stands in the .txt beside it.

    Raises: ValueError for a file without a prompt, another number of prompts than files, and a "file" that two
        prompts have, or only some.
    """
    if prompts is None:
        return [Item(path, _beside(path), {}) for path in files]
    rows = list(zip(prompts.text, prompts.metadata, strict=True))
    if len(rows) == 1:
        rows *= len(files)
    elif all("file" in metadata for _, metadata in rows):
        named = {str(metadata["file"]): (text, metadata) for text, metadata in rows}
        _check_names([str(metadata["file"]) for _, metadata in rows], {path.name for path in files})
        missing = [path for path in files if path.name not in named]
        if missing:
            raise ValueError(f'{missing[0]} has no line in the prompts: none has the "file" {missing[0].name!r}')
        rows = [named[path.name] for path in files]
    elif any("file" in metadata for _, metadata in rows):
        raise ValueError('some of the prompts have a "file" and some have none: give it to all or to none')
    if len(rows) != len(files):
        raise ValueError(
            f"{len(files)} files but {len(rows)} prompts: give one for all, one for each in the order of names, or "
            'JSON lines with "file" and "prompt"'
        )
    return [Item(path, text, metadata) for path, (text, metadata) in zip(files, rows, strict=True)]


def _check_names(names: Sequence[str], files: set[str]) -> None:
    """Tell of prompts whose file is not scored. Raises: ValueError where two prompts are for one file."""
    twice = [name for name, times in Counter(names).items() if times > 1]
    if twice:
        raise ValueError(f'{len(twice)} files have two prompts or more, such as "file": {twice[0]!r}; give each one')
    lone = [name for name in names if name not in files]
    if lone:
        _log.warning("%d prompts are of files that are not scored here, such as %r", len(lone), lone[0])


def _beside(path: Path) -> str:
    text = path.with_suffix(".txt")
    if not text.is_file():
        raise ValueError(f"{path} has no prompt: give --prompt, --prompts, or a file {text.name} beside it")
    return text.read_text("utf-8-sig").strip()


def score_files(reward: Reward, items: Sequence[Item], batch_size: int) -> tuple[Scores, list[Tensor]]:
    """The scores of all files, in order, and a small picture of each. Media of one size are scored together."""
    progress = Progress(len(items))
    parts, small = [], []
    for batch, media, told in _batches(items, batch_size):
        scores = reward(media, told)
        parts.append(Scores(scores.total.cpu(), {k: v.cpu() for k, v in scores.parts.items()}, scores.valid.cpu()))
        small += [_small(pixels) for pixels in media.pixels]
        for _ in batch:
            progress.update(1, {})
    progress.close()
    return join_scores(parts), small


def _batches(items: Sequence[Item], size: int) -> Iterator[tuple[list[Item], Media, Prompts]]:
    held: list[tuple[Item, Tensor]] = []
    rate: float | None = None
    for item in items:
        pixels, fps = load(item.path)
        if held and (len(held) == size or held[0][1].shape != pixels.shape or rate != fps):
            yield _together(held, rate)
            held = []
        held.append((item, pixels))
        rate = fps
    if held:
        yield _together(held, rate)


def _together(held: Sequence[tuple[Item, Tensor]], rate: float | None) -> tuple[list[Item], Media, Prompts]:
    batch = [item for item, _ in held]
    told = Prompts(tuple(item.prompt for item in batch), tuple(item.metadata for item in batch))
    return batch, shown(torch.stack([pixels for _, pixels in held]), told, rate), told


def _small(pixels: Float[Tensor, "*frames 3 h w"]) -> Float[Tensor, "3 128 128"]:
    """For the sheet: a video's middle frame, whole, in a square of 128 pixels."""
    picture = pixels[len(pixels) // 2] if pixels.ndim == 4 else pixels
    height, width = picture.shape[1:]
    scale = 128 / max(height, width)
    size = (max(round(height * scale), 1), max(round(width * scale), 1))
    mode = "nearest" if scale > 1 else "area"
    fitted = torch.nn.functional.interpolate(picture[None], size=size, mode=mode)[0]
    square = torch.ones(3, 128, 128)
    top, left = (128 - size[0]) // 2, (128 - size[1]) // 2
    square[:, top : top + size[0], left : left + size[1]] = fitted
    return square


def write(items: Sequence[Item], scores: Scores, small: Sequence[Tensor], out: Path, name: str) -> str:
    """Leave `scores.jsonl` and `sheet.png` in a folder; returns the table, best first."""
    out.mkdir(parents=True, exist_ok=True)
    rows = [_row(item, scores, i) for i, item in enumerate(items)]
    write_atomically(out / "scores.jsonl", json_lines(rows))
    order = sorted(range(len(items)), key=lambda i: (not scores.valid[i], -float(scores.total[i].nan_to_num())))
    listed = order if len(order) <= SHEET else order[: SHEET // 2] + order[-SHEET // 2 :]
    captions = [f"{_number(scores, i)}\n{items[i].path.name}\n{items[i].prompt}" for i in listed]
    write_atomically(out / "sheet.png", grid(torch.stack([small[i] for i in listed]), captions))
    return table(items, scores, order, name)


def _row(item: Item, scores: Scores, index: int) -> dict[str, Any]:
    valid = bool(scores.valid[index])
    values = {"total": scores.total, **scores.parts}
    known = {name: float(value[index]) for name, value in values.items()}
    kept = {name: value if valid and math.isfinite(value) else None for name, value in known.items()}
    return {"file": str(item.path), "prompt": item.prompt, "valid": valid, **kept}


def _number(scores: Scores, index: int) -> str:
    return f"{float(scores.total[index]):.4g}" if scores.valid[index] else "no score"


def table(items: Sequence[Item], scores: Scores, order: Sequence[int], name: str) -> str:
    """Score, file and prompt in columns, then the mean and how many have none."""
    lines = [f"{_number(scores, i):>10}  {items[i].path}  {items[i].prompt}" for i in order]
    known = scores.total[scores.valid]
    mean = f"{float(known.mean()):.4g}" if len(known) else "none"
    without = int((~scores.valid).sum())
    told = f"; {without} have no score" if without else ""
    return "\n".join([f"{name:>10}  file  prompt", *lines, f"{mean:>10}  mean of {len(known)}{told}"])
