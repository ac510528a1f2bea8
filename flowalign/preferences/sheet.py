"""Pairs for a person to look at."""

from __future__ import annotations

import io
import json
from itertools import islice
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn.functional import pad

from flowalign.media import load
from flowalign.pictures import grid, to_images
from flowalign.videos import stills

SHOWN = 24  # pairs of a sheet


def png(picture: UInt8[Tensor, "3 h w"]) -> bytes:
    """A picture as a file."""
    buffer = io.BytesIO()
    to_images(picture[None] / 255)[0].save(buffer, "PNG")
    return buffer.getvalue()


def beside(left: Float[Tensor, "*frames 3 h w"], right: Float[Tensor, "*frames 3 h w"]) -> Float[Tensor, "3 h2 w2"]:
    """Two pictures beside each other, white between them; of videos strips of frames, one below the other."""
    one, other = (stills(media[None])[0] for media in (left, right))
    gap = max(2, one.shape[-1] // 32)
    if left.ndim == 4:
        return torch.cat([pad(one, (0, 0, 0, gap), value=1), other], 1)
    return torch.cat([pad(one, (0, gap), value=1), other], 2)


def sheet(root: Path, pairs: Path) -> bytes | None:
    """A PNG of the first pairs of a file of ours, the preferred one left, or above; None where there is none."""
    with pairs.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in islice(file, SHOWN)]
    pictures, captions = list[Tensor](), list[str]()
    for row in rows:
        sides = ("first", "second") if row["label"] != "second" else ("second", "first")
        media = [load(root / row[side])[0] for side in sides]
        scores = row.get("scores")
        if scores is not None and sides[0] == "second":
            scores = scores[::-1]
        pictures.append(beside(*media))
        captions.append(row["prompt"] + ("" if scores is None else f"\n{scores[0]:.3f} > {scores[1]:.3f}"))
    return grid(pictures, captions) if pictures else None
