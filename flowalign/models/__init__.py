"""Adapters over diffusers pipelines, one file per family."""

from __future__ import annotations

from typing import Any

from flowalign.models.base import Model
from flowalign.models.controlnet import ControlledUNet, ControlNet
from flowalign.models.flux import Flux
from flowalign.models.loading import pipeline_class, settings_of
from flowalign.models.pipeline import PipelineModel
from flowalign.models.pixart import PixArt
from flowalign.models.qwen_image import QwenImage
from flowalign.models.sana import Sana
from flowalign.models.sd3 import SD3
from flowalign.models.unet import StableDiffusion, StableDiffusionXL
from flowalign.models.wan import Wan, WanImageToVideo
from flowalign.models.z_image import ZImage

FAMILIES: tuple[type[PipelineModel], ...] = (
    SD3,
    StableDiffusion,
    StableDiffusionXL,
    ControlNet,
    Flux,
    QwenImage,
    ZImage,
    PixArt,
    Sana,
    Wan,
    WanImageToVideo,
)

__all__ = [
    "SD3",
    "ControlNet",
    "ControlledUNet",
    "Flux",
    "Model",
    "PipelineModel",
    "PixArt",
    "QwenImage",
    "Sana",
    "StableDiffusion",
    "StableDiffusionXL",
    "Wan",
    "WanImageToVideo",
    "ZImage",
    "as_model",
    "family_of",
]


def as_model(model: Any) -> Model:
    """A model as it is, or the adapter with its default settings of a diffusers pipeline, its folder or hub id.

    Raises: ValueError for a pipeline of an unknown family.
    """
    if isinstance(model, Model):
        return model
    if isinstance(model, str):
        return family_of(pipeline_class(model))(model, **settings_of(model))
    return family_of(type(model).__name__)(model)


def family_of(pipeline: str) -> type[PipelineModel]:
    """The adapter for a diffusers class by its name. Raises: ValueError where there is none."""
    for family in FAMILIES:
        if pipeline in family.pipelines:
            return family
    known = ", ".join(name for family in FAMILIES for name in family.pipelines)
    raise ValueError(
        f"no adapter for {pipeline}; there are adapters for {known}. "
        "Another one is a subclass of flowalign.models.PipelineModel"
    )
