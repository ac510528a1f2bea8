"""Pictures from a model by the ODE, from keyed noise: what evaluation looks at, and what `flowalign sample` writes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from flowalign.config import ConfigError, build, load_yaml, override
from flowalign.models import Model, family_of
from flowalign.models.loading import pipeline_class
from flowalign.pictures import grid, to_images
from flowalign.progress import Progress
from flowalign.prompts import as_prompts
from flowalign.randomness import key_noise
from flowalign.rollout import Policy, rollout
from flowalign.schedules import Path
from flowalign.tracking import write_atomically
from flowalign.transitions import ODE


def start_noise(model: Model, seed: int, purpose: str, index: Sequence[int]) -> Float[Tensor, b * d]:
    """The start noise of picture i for each i of `index`: a function of seed, purpose and i alone."""
    return torch.stack([key_noise(seed, purpose, i, shape=model.latent_shape) for i in index])


@torch.no_grad()
def pictures(
    model: Model,
    texts: Sequence[str],
    steps: int,
    guidance_scale: float,
    seed: int = 0,
    purpose: str = "sample",
    rows_per_call: int = 64,
    calls: range | None = None,
) -> Iterator[Float[Tensor, "b *frames 3 h w"]]:
    """The pictures of texts, `rows_per_call` at a time and in order, in [0, 1]; of some of those calls, or of all."""
    path, sigmas, policy = Path((ODE(),) * steps), model.sigmas(steps), Policy(guidance_scale)
    parts = torch.arange(len(texts)).split(rows_per_call)
    for call in range(len(parts)) if calls is None else calls:
        index = parts[call].tolist()
        noise = start_noise(model, seed, purpose, index).to(model.device)
        made = rollout(model, model.encode([texts[i] for i in index]), noise, sigmas, path, policy)
        yield model.decode(made.latents)


@dataclass(frozen=True)
class Request:
    """What `flowalign sample` was asked for; None where a run's own setting, or the default, is meant.

    options: arguments of the model under keys that start with "model.".
    """

    target: str
    prompt: tuple[str, ...]
    prompts: str | None
    lora: str | None
    base: bool
    steps: int | None
    guidance_scale: float | None
    seed: int
    batch_size: int
    out: FilePath
    options: Mapping[str, Any]
    allow_code: bool


def save_pictures(request: Request) -> FilePath:
    """Write `0000.png` ... and `grid.png` into the folder asked for; returns the sheet's path.

    Raises: ValueError for settings that do not go together, before a model is loaded.
    """
    texts = request.prompt + (as_prompts(request.prompts).text if request.prompts else ())
    if not texts:
        raise ValueError("sample needs --prompt TEXT or --prompts FILE")
    unknown = [key for key in request.options if not key.startswith("model.")]
    if unknown:
        raise ValueError(f"--{unknown[0]} is no option of sample; the model's arguments are --model.NAME")
    if request.base and request.lora:
        raise ValueError("--base and --lora exclude each other")
    if request.batch_size < 1 or (request.steps is not None and request.steps < 1):
        raise ValueError("--steps and --batch-size must be at least 1")
    if request.out.exists() and (not request.out.is_dir() or any(request.out.iterdir())):
        raise ValueError(f"{request.out} is in use; name another folder with --out")
    config = override(_config(request), request.options)
    model: Model = build(_model_of, {"model": config["model"]}, request.allow_code)
    steps, scale = _settings(request, config)
    request.out.mkdir(parents=True, exist_ok=True)
    progress = Progress(-(-len(texts) // request.batch_size))
    made: list[Tensor] = []
    for pixels in pictures(model, texts, steps, scale, request.seed, rows_per_call=request.batch_size):
        for image in to_images(pixels):
            image.save(request.out / f"{len(made):04d}.png")
            made.append(pixels[len(made) % request.batch_size].cpu())
        progress.update(len(pixels), {})
    progress.close()
    write_atomically(request.out / "grid.png", grid(torch.stack(made), texts))
    return request.out / "grid.png"


def _model_of(model: Model) -> Model:
    return model


def _config(request: Request) -> dict[str, Any]:
    """A run's config, or one for a bare pipeline, with the LoRA that was asked for in it."""
    run = FilePath(request.target)
    lora = request.lora
    if (run / "config.yaml").is_file():
        config = load_yaml(run / "config.yaml")
        if not isinstance(config.get("model"), dict):
            raise ConfigError(f"{run / 'config.yaml'} names no model; name its pipeline, and --lora {run / 'lora'}")
        if lora is None and not request.base:
            lora = str(run / "lora")
    else:
        family = family_of(pipeline_class(request.target))
        config = {"model": {"class": f"flowalign.models.{family.__name__}", "pipeline": request.target}}
    # a policy trained in half precision is sampled in full unless asked otherwise
    config["model"] = {key: value for key, value in config["model"].items() if not key.endswith("_precision")}
    if lora is not None:
        if not FilePath(lora).exists():
            raise ValueError(f"{lora} does not exist; --lora takes a folder or file of LoRA weights")
        config["model"]["lora"] = {"start": lora}
    return config


def _settings(request: Request, config: Mapping[str, Any]) -> tuple[int, float]:
    """Steps and guidance: asked for, the run's evaluation's, its rollouts', or 28 and 4.5."""
    chosen = []
    for name, asked, default in (("steps", request.steps, 28), ("guidance_scale", request.guidance_scale, 4.5)):
        known = [config.get(part, {}).get(name) for part in ("evaluation", "sampling")]
        chosen.append(next(value for value in (asked, *known, default) if value is not None))
    return chosen[0], chosen[1]
