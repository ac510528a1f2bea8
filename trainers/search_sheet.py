"""Pictures of a search: each prompt's plain sample beside the best that was found."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

from flowalign.pictures import grid, to_images
from flowalign.videos import stills
from trainers.search_state import Candidate

SHOWN = 36  # prompts of a sheet, the first
Picture = Float[Tensor, "3 _ _"]


def strip(media: UInt8[Tensor, "*frames 3 h w"]) -> Picture:
    """A picture as it is, or a video's strip of frames."""
    drawn: Tensor = stills(media[None].float() / 255)[0]
    return drawn


def png(picture: Picture) -> bytes:
    """A picture as a file."""
    buffer = io.BytesIO()
    to_images(picture[None])[0].save(buffer, "PNG")
    return buffer.getvalue()


def sheet(
    folder: Path,
    prompts: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
    lines: Mapping[int, tuple[Candidate | None, Candidate | None]],
) -> bytes | None:
    """A PNG of prompts: those that have ended from their files, those under way as they are; None while there is none.

    lines: the first and the best candidate of each prompt under way, by its number.
    """
    ended = {row["number"]: row for row in rows}
    pairs, captions = list[Tensor](), list[str]()
    for number, prompt in enumerate(prompts):
        row, (first, best) = ended.get(number), lines.get(number, (None, None))
        if row is not None:
            before, after = (_read(folder / f"{number:04d}{end}.png") for end in ("-before", ""))
            scores = row["before"], row["score"]
        elif best is not None:
            before, after = (None if one is None else strip(one.media) for one in (first, best))
            scores = None if first is None else first.score, best.score
        else:
            continue
        pairs.append(_pair(before, after))
        captions.append(f"{prompt}\n{_told(scores[0])} -> {_told(scores[1])}")
    return grid(pairs, captions) if pairs else None


def _told(score: float | None) -> str:
    return "no score" if score is None else f"{score:.3f}"


def _read(path: Path) -> Picture | None:
    if not path.is_file():
        return None
    with Image.open(path, formats=["PNG"]) as image:
        return torch.from_numpy(np.asarray(image.convert("RGB")).copy()).permute(2, 0, 1) / 255


def _pair(before: Picture | None, after: Picture | None) -> Picture:
    """Two pictures beside each other, wide ones one below the other; grey where there is none."""
    known = after if after is not None else before
    grey = torch.full((3, 32, 32) if known is None else known.shape, 0.5)
    left, right = (grey if one is None else one for one in (before, after))
    gap = max(1, left.shape[-1] // 32)
    if left.shape[-1] > 3 * left.shape[-2]:
        return torch.cat([pad(left, (0, 0, 0, gap), value=1), right], 1)
    return torch.cat([pad(left, (0, gap), value=1), right], 2)
