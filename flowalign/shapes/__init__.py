"""The embedded world: captioned scenes of coloured shapes, small trained models of them, and a verifier of pixels."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from flowalign.shapes.prompts import held_out_prompts, train_prompts

if TYPE_CHECKING:
    from diffusers import StableDiffusion3Pipeline
    from transformers import CLIPModel, CLIPTokenizer

WEIGHTS = Path(__file__).parent / "weights"
__all__ = ["WEIGHTS", "clip", "held_out_prompts", "text_to_image", "train_prompts"]


def text_to_image() -> StableDiffusion3Pipeline:
    """The base model: a StableDiffusion3Pipeline for 32 x 32 pictures, float32, trained on partly wrong captions."""
    from diffusers import StableDiffusion3Pipeline

    pipe = StableDiffusion3Pipeline.from_pretrained(WEIGHTS / "text-to-image", text_encoder_3=None, tokenizer_3=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def clip() -> tuple[CLIPModel, CLIPTokenizer]:
    """A CLIP trained on right captions of the world, float32: the differentiable reward."""
    from transformers import CLIPModel, CLIPTokenizer

    return CLIPModel.from_pretrained(WEIGHTS / "clip"), CLIPTokenizer.from_pretrained(WEIGHTS / "clip")
