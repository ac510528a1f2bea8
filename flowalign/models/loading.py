"""From a name to a diffusers pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowalign.out_of_memory import out_of_memory

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Embedded:
    """A pipeline that comes with the package.

    kind: its diffusers class. load: the function of flowalign.shapes that loads it. settings: arguments of the adapter
    that it was trained for, where the adapter's defaults are a large model's.
    """

    kind: str
    load: str
    settings: Mapping[str, Any] = field(default_factory=dict)


EMBEDDED = {
    "shapes": Embedded("StableDiffusion3Pipeline", "text_to_image"),
    "shapes-few-step": Embedded("StableDiffusion3Pipeline", "few_step"),
    "shapes-video": Embedded(
        "WanPipeline",
        "text_to_video",
        {"height": 32, "width": 32, "frames": 9, "fps": 8, "max_sequence_length": 20},
    ),
}
NAMES = ", ".join(EMBEDDED)


def load_pipeline(pipeline: Any, families: tuple[str, ...], dtypes: Mapping[str, torch.dtype] | None = None) -> Any:
    """A pipeline as it is, or that of a folder, a hub id, or an embedded one's name (`EMBEDDED`).

    One that was saved without a part, such as SD3's T5, comes without it.

    Args:
        families: names of the diffusers classes that will do.
        dtypes: what to read the weights of a folder's or hub id's components as, by name, and "default".

    Raises: ValueError where it is of another class, or cannot be had.
    """
    loaded = _load(pipeline, dtypes) if isinstance(pipeline, str) else pipeline
    if not {kind.__name__ for kind in type(loaded).__mro__} & {*families}:
        name = f"{pipeline} is" if isinstance(pipeline, str) else "this is"
        raise ValueError(f"{name} a {type(loaded).__name__}, not a {' or '.join(families)}")
    return loaded


def _load(name: str, dtypes: Mapping[str, torch.dtype] | None) -> Any:
    from diffusers import DiffusionPipeline

    if name in EMBEDDED:
        import flowalign.shapes

        return getattr(flowalign.shapes, EMBEDDED[name].load)()
    _check_folder(name)
    try:
        place = Path(name).expanduser() if _is_path(name) else name
        named = None if dtypes is None else dict(dtypes)
        without = {part: None for part, kind in DiffusionPipeline.load_config(place).items() if kind == [None, None]}
        return DiffusionPipeline.from_pretrained(place, dtype=named, use_safetensors=True, **without)
    except Exception as error:  # what stands in a folder decides which kind
        raise unreadable(f"the pipeline {name!r} can be had neither as a folder nor from the hub", error) from error


def unreadable(line: str, error: Exception) -> Exception:
    """The error, begun so, of a pipeline or a part of one that is not there, is broken, or would run its own code."""
    if out_of_memory(error):
        return error
    pickled = "; pickled weights (*.bin) are not read: who trusts them saves them as safetensors once"
    hint = pickled if "safetensors" in str(error) else ""
    return ValueError(f"{line}: {str(error)[:400]}{hint}")


def pipeline_class(name: str) -> str:
    """The diffusers class of the pipeline of a folder, a hub id, or an embedded one, without loading its weights.

    Raises: ValueError where there is none.
    """
    from diffusers import DiffusionPipeline

    if name in EMBEDDED:
        return EMBEDDED[name].kind
    _check_folder(name)
    try:
        return str(
            DiffusionPipeline.load_config(str(Path(name).expanduser()) if _is_path(name) else name)["_class_name"]
        )
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{name!r} is no diffusers pipeline, neither as a folder nor on the hub: {error}") from error


def settings_of(name: str) -> Mapping[str, Any]:
    """Arguments of the adapter that go with a pipeline's name: none but for some embedded ones."""
    return EMBEDDED[name].settings if name in EMBEDDED else {}


def _is_path(name: str) -> bool:
    return Path(name).expanduser().is_dir()


def _check_folder(name: str) -> None:
    if name.startswith((".", "/", "~")) and not _is_path(name):
        raise ValueError(f"{name} is not a folder; name a pipeline's folder, a hub id, or one of {NAMES}")
