"""Pictures from a model by the ODE, from keyed noise: what evaluation looks at, and what `flowalign sample` writes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from flowalign.config import ConfigError, build, load_yaml, override, read_options
from flowalign.distributed import agree, data_rank, data_size, is_first, on_main, share, split_calls
from flowalign.media import load
from flowalign.models import Model, family_of
from flowalign.models.loading import pipeline_class, settings_of
from flowalign.pictures import grid, to_bytes, to_images
from flowalign.progress import Progress
from flowalign.prompts import PromptData, as_prompts
from flowalign.randomness import key_noise
from flowalign.records import Prompts
from flowalign.rollout import Policy, rollout
from flowalign.schedules import Path
from flowalign.sizes import Call, calls_of
from flowalign.tracking import write_atomically
from flowalign.transitions import ODE
from flowalign.videos import check_writable, mp4, stills
from flowalign.whole import is_network, weights_in


def start_noise(model: Model, seed: int, purpose: str, index: Sequence[int]) -> Float[Tensor, b * d]:
    """The start noise of picture i for each i of `index`: a function of seed, purpose and i alone."""
    return torch.stack([key_noise(seed, purpose, i, shape=model.latent_shape) for i in index])


@torch.no_grad()
def pictures(
    model: Model,
    prompts: PromptData,
    steps: int,
    guidance_scale: float,
    seed: int = 0,
    purpose: str = "sample",
    rows_per_call: int = 64,
    calls: Sequence[Call] | None = None,
) -> Iterator[Float[Tensor, "b *frames 3 h w"]]:
    """The pictures of prompts in [0, 1], call by call; by default in the calls that `calls_of` makes of all.

    Prompts may say a negative_prompt, their size, and the seed of their noise, which is their number by default.
    """
    prompts = as_prompts(prompts).all()
    for call in calls_of(model, prompts, rows_per_call) if calls is None else calls:
        told = prompts.rows(call.rows)
        with model.sized(call.size):
            latents = start_noise(model, seed, purpose, told.noise_keys(call.rows)).to(model.device)
            condition = model.condition(told)
            path, policy = Path((ODE(),) * steps), Policy(guidance_scale)
            latents = rollout(model, condition, latents, model.sigmas(steps), path, policy).latents
            pixels = model.decode_rows(latents, len(latents))
        yield pixels


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


def read_prompts(text: str, allow_code: bool) -> Prompts:
    """What a command's --prompts names: a file, or {class: ...} as in a config."""
    if not text.lstrip().startswith("{"):
        return as_prompts(text).all()
    return build(as_prompts, read_options(["--prompts", text]), allow_code).all()


def save_pictures(request: Request) -> FilePath:
    """Write `0000.png` ... and `grid.png` into the folder asked for; returns the sheet's path.

    A video is `0000.mp4`, and its PNG a strip of its frames.

    Raises: ValueError for settings that do not go together, before a model is loaded.
    """
    held = read_prompts(request.prompts, request.allow_code) if request.prompts else Prompts((), ())
    prompts = Prompts(request.prompt + held.text, ({},) * len(request.prompt) + held.metadata)
    if not len(prompts):
        raise ValueError("sample needs --prompt TEXT or --prompts FILE")
    unknown = [key for key in request.options if not key.startswith("model.")]
    if unknown:
        raise ValueError(f"--{unknown[0]} is no option of sample; the model's arguments are --model.NAME")
    if request.base and request.lora:
        raise ValueError("--base and --lora exclude each other")
    if request.batch_size < 1 or (request.steps is not None and request.steps < 1):
        raise ValueError("--steps and --batch-size must be at least 1")
    on_main(lambda: _check_out(request.out))
    config = override(config_of(request), request.options)
    model: Model = build(_model_of, {"model": config["model"]}, request.allow_code)
    steps, scale = steps_and_guidance(request, config)
    if model.fps is not None:
        check_writable()
    split_calls(model.callers)
    calls = calls_of(model, prompts, request.batch_size)
    on_main(lambda: request.out.mkdir(parents=True, exist_ok=True))
    mine = share(len(calls), data_rank(), data_size())
    own = calls[mine.start : mine.stop]
    progress = Progress(len(own))
    made: dict[int, Tensor] = {}
    drawn = pictures(model, prompts, steps, scale, request.seed, calls=own)
    for call, pixels in zip(own, drawn, strict=True):
        if is_first():
            _save(request.out, call, pixels, model.fps)
        made |= zip(call.rows, stills(pixels).cpu(), strict=True)
        progress.update(len(pixels), {})
    progress.close()
    agree(None)  # all pictures are there

    def sheet() -> None:
        every = [made[i] if i in made else load(request.out / f"{i:04d}.png")[0] for i in range(len(prompts))]
        write_atomically(request.out / "grid.png", grid(every, prompts.text))

    on_main(sheet)
    return request.out / "grid.png"


def _check_out(out: FilePath) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is in use; name another folder with --out")


def _save(out: FilePath, call: Call, pixels: Float[Tensor, "b *frames 3 h w"], fps: float | None) -> None:
    """A PNG of each, and an MP4 of each video."""
    for i, one, image in zip(call.rows, to_bytes(pixels), to_images(stills(pixels).cpu()), strict=True):
        image.save(out / f"{i:04d}.png")
        if fps is not None:
            write_atomically(out / f"{i:04d}.mp4", mp4(one, fps))


def _model_of(model: Model) -> Model:
    return model


def config_of(request: Request) -> dict[str, Any]:
    """A run's config, or one for a bare pipeline, with the LoRA that was asked for in it."""
    run = FilePath(request.target)
    lora = request.lora
    if (run / "config.yaml").is_file():
        config = load_yaml(run / "config.yaml")
        if not isinstance(config.get("model"), dict):
            raise ConfigError(f"{run / 'config.yaml'} names no model; name its pipeline, and --lora {run / 'lora'}")
        if lora is None and not request.base:
            lora = str(weights_in(run))
    else:
        family = family_of(pipeline_class(request.target))
        settings = {"pipeline": request.target, **settings_of(request.target)}
        config = {"model": {"class": f"flowalign.models.{family.__name__}", **settings}}
    # a policy trained in half precision is sampled in full unless asked otherwise
    config["model"] = {key: value for key, value in config["model"].items() if not key.endswith("_precision")}
    memory = config["model"].get("memory")
    if memory:  # without gradient a call fits one process, and each draws for itself unless asked otherwise
        config["model"]["memory"] = {key: value for key, value in memory.items() if key != "context_parallel"}
    if lora is not None:
        if not FilePath(lora).exists():
            raise ValueError(f"{lora} does not exist; --lora takes a folder or file of LoRA weights")
        whole = is_network(FilePath(lora))
        config["model"]["lora"] = {"class": "flowalign.whole.Full", "start": lora} if whole else {"start": lora}
    return config


def steps_and_guidance(request: Request, config: Mapping[str, Any]) -> tuple[int, float]:
    """Steps and guidance: asked for, the run's evaluation's, its rollouts', or 28 and 4.5."""
    chosen = []
    for name, asked, default in (("steps", request.steps, 28), ("guidance_scale", request.guidance_scale, 4.5)):
        known = [config.get(part, {}).get(name) for part in ("evaluation", "sampling")]
        chosen.append(next(value for value in (asked, *known, default) if value is not None))
    return chosen[0], chosen[1]
