"""From a name to a diffusers pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SHAPES = "shapes"


def load_pipeline(name: str, family: type) -> Any:
    """The pipeline of a folder, a hub id, or "shapes" (embedded).

    Raises: ValueError where it is of another family than asked for, or cannot be had.
    """
    from diffusers import DiffusionPipeline

    if name == SHAPES:
        from flowalign.shapes import text_to_image

        pipeline: Any = text_to_image()
    else:
        if name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
            raise ValueError(f"{name} is not a folder; name a pipeline's folder, a hub id, or 'shapes'")
        try:
            pipeline = DiffusionPipeline.from_pretrained(Path(name).expanduser() if Path(name).is_dir() else name)
        except OSError as error:
            raise ValueError(
                f"the pipeline {name!r} can be had neither as a folder nor from the hub: {error}"
            ) from error
    if not isinstance(pipeline, family):
        raise ValueError(f"{name} is a {type(pipeline).__name__}, not a {family.__name__}")
    return pipeline
