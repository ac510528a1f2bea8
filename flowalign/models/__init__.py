"""Adapters over diffusers pipelines, one file per family."""

from __future__ import annotations

from typing import Any

from flowalign.models.base import Model
from flowalign.models.sd3 import SD3


def as_model(model: Any) -> Model:
    """A model as it is, or the adapter of a diffusers pipeline with its default settings.

    Raises: ValueError for a pipeline of an unknown family.
    """
    if isinstance(model, Model):
        return model
    if type(model).__name__ == "StableDiffusion3Pipeline":
        return SD3(model)
    raise ValueError(
        f"no adapter for {type(model).__name__}; known: StableDiffusion3Pipeline. "
        "Another one takes a subclass of flowalign.models.base.Model"
    )
