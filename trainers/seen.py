"""What an evaluation has made, in the prompts' order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jaxtyping import Float, UInt8
from torch import Tensor

from flowalign.records import Scores


@dataclass(frozen=True)
class Seen:
    """stills: pictures in 8 bits, of videos strips of frames. films: MP4s of the first. looks: by name, see
    `flowalign.looks`; empty where nothing is watched."""

    stills: Sequence[UInt8[Tensor, "3 _ _"]]
    films: Mapping[int, bytes]
    scores: Scores
    looks: Mapping[str, Float[Tensor, " n"]]
