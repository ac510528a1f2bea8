"""What a reward is, in a few words: its weights, their licence, and what one score depends on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SCOPES = ("sample", "group", "set")  # from the narrowest on


@dataclass(frozen=True)
class Card:
    """What a reward is.

    weights: hub id and file, or where else they are from. licence: of the weights. usual: the range most scores lie in.
    modality: what it looks at; "any" for what passes its media on. scope: what one score depends on: its own sample,
    the samples of its group, which have to be scored together, or all that are scored together. opens_files: whether it
    opens files that prompts name (`flowalign.media.FILES`), and so is of no use to who is elsewhere.
    """

    weights: str = ""
    licence: str = ""
    usual: tuple[float, float] | None = None
    modality: Literal["image", "video", "latent", "any"] = "image"
    scope: Literal["sample", "group", "set"] = "sample"
    opens_files: bool = False
