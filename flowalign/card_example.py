"""The code on a card: how a policy is used in plain diffusers, as it was sampled where it was evaluated."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from flowalign.exporting import Policy, loads_loras
from flowalign.kohya import layout_of
from flowalign.models.loading import EMBEDDED, settings_of

IMAGE_FIRST = ("WanImageToVideoPipeline", "StableDiffusionControlNetPipeline")
HALF = {"bf16": "bfloat16", "fp16": "float16"}
PICTURE = """\
image = pipe(
{arguments}
).images[0]
image.save("picture.png")"""
VIDEO = """\
frames = pipe(
{arguments}
).frames[0]
export_to_video(frames, "video.mp4", fps={fps:g})"""
SAME = (
    "negative_prompt",
    "height",
    "width",
    "max_sequence_length",
)  # as a model's settings and a pipeline's call say it


@dataclass(frozen=True)
class Use:
    """What the code is about.

    config: the run's, as others may see it. base: the base model as it is shown. repo: on the hub, None for a folder.
    name: of kohya's file. absent: components that the pipeline is made without. prompt: to draw.
    """

    policy: Policy
    config: Mapping[str, Any]
    format: str
    base: str
    repo: str | None
    name: str
    absent: tuple[str, ...]
    prompt: str

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The adapter's settings in the run."""
        model = self.config.get("model")
        return dict(settings_of(self.policy.base)) | (dict(model) if isinstance(model, dict) else {})

    @property
    def video(self) -> bool:
        """Whether videos are made."""
        return self.policy.kind.startswith("Wan")

    @property
    def embedded(self) -> bool:
        """Whether the base model is one of FlowAlign's package, and is loaded by it."""
        return self.policy.base in EMBEDDED and self.format != "merged"


def inference(config: Mapping[str, Any]) -> dict[str, Any]:
    """Steps and guidance of the run's evaluations, else of its rollouts; what is not told is left out."""
    found = dict[str, Any]()
    for ours, theirs in (("steps", "num_inference_steps"), ("guidance_scale", "guidance_scale")):
        parts = [config.get(part) for part in ("evaluation", "sampling")]
        told = [part.get(ours) for part in parts if isinstance(part, dict) and part.get(ours) is not None]
        if told:
            found[theirs] = told[0]
    return found


def example(use: Use) -> str | None:
    """Code that runs where the card lies, or anywhere once it is on the hub; None where diffusers does not read it."""
    if use.format == "kohya" and not reads_kohya(use.policy.kind):
        return None
    arguments = "\n".join(f"    {one}," for one in _arguments(use))
    made = (VIDEO if use.video else PICTURE).format(arguments=arguments, fps=use.settings.get("fps") or 16)
    return "\n".join([*_imports(use), "", *_loading(use), made])


def reads_kohya(kind: str) -> bool:
    """Whether diffusers reads kohya's layout for a class of pipelines: for all but SD3."""
    return layout_of(kind).family != "SD3"


def _imports(use: Use) -> list[str]:
    lines, kind = ["import torch"], use.policy.kind
    if not use.embedded:
        lines.append(f"from diffusers import {kind}")
    tools = [*(["export_to_video"] if use.video else []), *(["load_image"] if kind in IMAGE_FIRST else [])]
    if tools:
        lines.append(f"from diffusers.utils import {', '.join(tools)}")
    if use.embedded:
        lines.append(
            f"from flowalign.shapes import {EMBEDDED[use.policy.base].load}  # pip install flowalign-diffusion"
        )
    if use.format != "merged" and not loads_loras(use.policy):
        lines.append("from peft import PeftModel")
    return lines


def _loading(use: Use) -> list[str]:
    here, half = f'"{use.repo}"' if use.repo else '"."', HALF.get(str(use.settings.get("mixed_precision")))
    lines = ['device = "cuda" if torch.cuda.is_available() else "cpu"']
    if use.embedded:
        lines.append(f"pipe = {EMBEDDED[use.policy.base].load}().to(device)")
    else:
        words = [here if use.format == "merged" else f'"{use.base}"', *(f"{one}=None" for one in use.absent)]
        if half:
            lines.append(f'dtype = torch.{half} if device == "cuda" else torch.float32')
            words.append("torch_dtype=dtype")
        said = "  # its folder" if use.format != "merged" and use.base != use.policy.base else ""
        lines.append(f"pipe = {use.policy.kind}.from_pretrained({', '.join(words)}).to(device){said}")
    if use.format == "kohya":
        lines.append(f'pipe.load_lora_weights({here}, weight_name="{use.name}.safetensors")')
    elif use.format == "diffusers" and loads_loras(use.policy):
        lines.append(f"pipe.load_lora_weights({here})")
    elif use.format == "diffusers":
        lines.append(f"PeftModel.from_pretrained(pipe.{use.policy.network}, {here})")
    return lines


def _arguments(use: Use) -> list[str]:
    """Of the pipeline's call; those that it does not take are left out."""
    import diffusers

    taken = inspect.signature(getattr(diffusers, use.policy.kind).__call__).parameters
    told, settings = inference(use.config), use.settings
    found = {"prompt": repr(use.prompt)}
    if use.policy.kind in IMAGE_FIRST:
        found["image"] = 'load_image("start.png")'
    found |= {name: repr(settings[name]) for name in SAME if settings.get(name) not in (None, "")}
    found |= {"use_resolution_binning": "False", "clean_caption": "False"}  # sizes and prompts as they are asked for
    if settings.get("frames"):
        found["num_frames"] = repr(settings["frames"])
    steps, scale = told.get("num_inference_steps"), told.get("guidance_scale")
    if steps is not None:
        found["num_inference_steps"] = repr(steps)
        if settings.get("grid") == "flowalign.schedules.linear":
            found["sigmas"] = f"[1 - i / {steps} for i in range({steps})]"
    if scale is not None:
        found |= guidance(use.policy.kind, float(scale), found.get("negative_prompt", "''"))
    found["generator"] = 'torch.Generator("cpu").manual_seed(0)'
    return [f"{name}={value}" for name, value in found.items() if name in taken]


def guidance(kind: str, scale: float, negative: str) -> dict[str, str]:
    """A guidance scale, of which 1 is none, as a pipeline takes it."""
    if kind == "QwenImagePipeline":  # its guidance_scale is for networks that are told it
        return {"true_cfg_scale": repr(scale)} | ({"negative_prompt": negative} if scale > 1 else {})
    if kind == "ZImagePipeline":  # which adds 1
        return {"guidance_scale": repr(max(scale - 1, 0.0))}
    return {"guidance_scale": repr(scale)}
