"""The first pictures from best to worst, each with its scores."""

from __future__ import annotations

import io
import textwrap

from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import avg_pool2d

from flowalign.pictures import GAP, grid
from trainers.preflight.trial import Rollouts

WIDTH = 256  # pixels of a picture, about: room for a caption of several parts
HEADING = 14


def contact_sheet(rollouts: Rollouts) -> bytes:
    """A PNG: the heading, then the pictures in the order of their advantage."""
    first = rollouts.first.nonzero().flatten()
    order = first[rollouts.advantages[first].argsort(descending=True, stable=True)]
    captions = [rollouts.captions[int(i)] for i in order]
    return _headed(grid(_enlarged(rollouts.pixels[order]), captions), rollouts.heading)


def _enlarged(pixels: Float[Tensor, "g 3 h w"]) -> Float[Tensor, "g 3 ..."]:
    """About `WIDTH` wide, by a whole factor."""
    width = pixels.shape[3]
    if width > 3 * pixels.shape[2]:  # a strip of a video's frames
        return pixels
    if width >= 2 * WIDTH:
        return avg_pool2d(pixels, width // WIDTH)
    factor = max(1, WIDTH // width)
    return pixels.repeat_interleave(factor, 2).repeat_interleave(factor, 3)


def _headed(sheet: bytes, prompt: str) -> bytes:
    """The sheet under its prompt, in two lines at most."""
    below = Image.open(io.BytesIO(sheet))
    letters = max(20, int(below.width / (0.55 * HEADING)))
    lines = textwrap.wrap(f"{prompt}   (best to worst)", letters, max_lines=2, placeholder=" ...")
    top = len(lines) * (HEADING + 4) + 2 * GAP
    whole = Image.new("RGB", (below.width, below.height + top), "white")
    whole.paste(below, (0, top))
    font = ImageFont.load_default(HEADING)
    ImageDraw.Draw(whole).multiline_text((GAP, GAP), "\n".join(lines), fill="black", font=font, spacing=4)
    buffer = io.BytesIO()
    whole.save(buffer, "PNG")
    return buffer.getvalue()
