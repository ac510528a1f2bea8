"""The embedded world: captioned scenes of coloured shapes, small trained models of them, and a verifier of pixels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from flowalign.shapes.prompts import held_out_prompts, train_prompts

if TYPE_CHECKING:
    from diffusers import StableDiffusion3Pipeline, WanPipeline
    from transformers import CLIPModel, CLIPTokenizer

WEIGHTS = Path(__file__).parent / "weights"
VIDEO_WEIGHTS = Path(__file__).parent / "video" / "weights"
__all__ = [
    "VIDEO_WEIGHTS",
    "WEIGHTS",
    "clip",
    "few_step",
    "held_out_prompts",
    "text_to_image",
    "text_to_video",
    "train_prompts",
]


@contextmanager
def _without_bars() -> Iterator[None]:
    """The weights are read in a blink: no progress bars of diffusers and transformers for that."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled(), diffusers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    diffusers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown[0]:
            transformers_logging.enable_progress_bar()
        if shown[1]:
            diffusers_logging.enable_progress_bar()


def text_to_image() -> StableDiffusion3Pipeline:
    """The base model: a StableDiffusion3Pipeline for 32 x 32 pictures, float32, trained on partly wrong captions."""
    import torch
    from diffusers import StableDiffusion3Pipeline

    with _without_bars():
        pipe = StableDiffusion3Pipeline.from_pretrained(
            WEIGHTS / "text-to-image", text_encoder_3=None, tokenizer_3=None, dtype=torch.float32
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def few_step() -> StableDiffusion3Pipeline:
    """The base model with the LoRA of its reflow fused in: draws in one to four steps, without guidance, float32."""
    pipe = text_to_image()
    name = "pytorch_lora_weights.safetensors"  # by the network: the pipeline warns that its encoders have none
    pipe.transformer.load_lora_adapter(str(WEIGHTS / "few-step"), weight_name=name, use_safetensors=True)
    pipe.transformer.fuse_lora()
    pipe.transformer.unload_lora()
    return pipe


def text_to_video() -> WanPipeline:
    """The base model of videos: a WanPipeline for nine frames of 32 x 32, float32, trained on partly wrong captions."""
    import torch
    from diffusers import WanPipeline

    with _without_bars():
        pipe = WanPipeline.from_pretrained(VIDEO_WEIGHTS / "text-to-video", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def clip() -> tuple[CLIPModel, CLIPTokenizer]:
    """A CLIP trained on right captions of the world, float32: the differentiable reward."""
    import torch
    from transformers import CLIPModel, CLIPTokenizer

    with _without_bars():
        model = CLIPModel.from_pretrained(WEIGHTS / "clip", dtype=torch.float32)
    return model, CLIPTokenizer.from_pretrained(WEIGHTS / "clip")
