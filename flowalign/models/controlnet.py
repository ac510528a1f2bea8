"""Stable Diffusion 1.5 and 2.1 with a ControlNet (arXiv:2302.05543): pictures that follow a map of edges, depth ..."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline
from jaxtyping import Float
from torch import Tensor

from flowalign.adapters import LoRA
from flowalign.fitting import fitted
from flowalign.media import load
from flowalign.models.base import Latents
from flowalign.models.encoding import Told
from flowalign.models.loading import load_pipeline, unreadable
from flowalign.models.memory import Memory, load_dtypes
from flowalign.models.pipeline import DTYPES, Precision
from flowalign.models.unet import StableDiffusion
from flowalign.records import Condition, Size
from flowalign.whole import Full

KEPT = 64  # control pictures on the host; one of 512 x 512 has 3 MB


class ControlNet(StableDiffusion):
    """A StableDiffusionControlNetPipeline with a LoRA policy on its ControlNet; arguments are `PipelineModel`'s.

    Each prompt names its control picture, with the key "image" in its record. It is `fitted` to the size that is made
    (the pipeline itself would squash it), so that picture, map and real media lie pixel on pixel. The policy is saved
    as peft does: diffusers' pipelines load no LoRA of a ControlNet, `peft.PeftModel.from_pretrained(pipe.controlnet,
    folder)` does.

    Args:
        controlnet: a folder or hub id of the ControlNet, for a `pipeline` that has none.
        conditioning_scale: what the ControlNet's output is multiplied by, in both halves of a guided call.

    Raises: ValueError for several ControlNets at once, and for one that pools its output.
    """

    pipelines = ("StableDiffusionControlNetPipeline",)
    network_name = "controlnet"
    beside_names: ClassVar[tuple[str, ...]] = ("unet",)
    takes_image = True

    def __init__(
        self,
        pipeline: DiffusionPipeline | str,
        controlnet: str | None = None,
        conditioning_scale: float = 1.0,
        lora: LoRA | Full | None = LoRA(),
        height: int | None = None,
        width: int | None = None,
        negative_prompt: str = "",
        mixed_precision: Precision = "no",
        decode_precision: Precision = "no",
        gradient_checkpointing: bool = False,
        compile: bool = False,
        device: str | None = None,
        prompts_per_call: int = 8,
        embeddings_gb: float = 8.0,
        memory: Memory = Memory(),
        embeddings: str | None = None,
    ) -> None:
        self.conditioning_scale = conditioning_scale
        if controlnet is not None:
            dtypes = DTYPES.get(mixed_precision), DTYPES.get(decode_precision)
            pipeline = with_controlnet(pipeline, controlnet, load_dtypes(("unet", "controlnet"), *dtypes))
        super().__init__(
            pipeline, lora, height, width, None, negative_prompt, None, mixed_precision, decode_precision,
            gradient_checkpointing, compile, device, prompts_per_call, embeddings_gb, memory,
            embeddings,
        )  # fmt: skip

    def prepare(self) -> None:
        super().prepare()
        kept = self.pipeline.controlnet
        if type(kept).__name__ != "ControlNetModel":
            raise ValueError(f"the pipeline's controlnet is a {type(kept).__name__}; it has to be one ControlNetModel")
        if kept.config.global_pool_conditions:
            raise ValueError("this ControlNet pools its output (global_pool_conditions), which is not supported")
        self._picture = lru_cache(maxsize=KEPT)(_picture)

    @property
    def denoiser(self) -> Any:
        return self.pipeline.unet

    @property
    def unet(self) -> Any:
        return self.beside["unet"]

    @property
    def control(self) -> Any:
        """The ControlNet as it is called."""
        return self.call

    def condition_on(self, condition: Condition, images: Sequence[str]) -> Condition:
        found = [self._picture(file, self.height, self.width) for file in images]
        return replace(condition, control=torch.stack(found).to(self.device))

    def residuals(self, x: Latents, time: Float[Tensor, " b"], told: Told) -> tuple[tuple[Tensor, ...], Tensor]:
        if told.control is None:
            raise ValueError('there is no control picture: prompts need an "image", the name of a file')
        down, middle = self.control(
            x,
            time,
            encoder_hidden_states=told.embeds.to(self.dtype),
            controlnet_cond=told.control.to(self.dtype),
            conditioning_scale=self.conditioning_scale,
            return_dict=False,
        )
        return tuple(down), middle


class ControlledUNet(ControlNet):
    """The same with the policy on the UNet, in diffusers' own layout; the ControlNet is left as it is."""

    network_name = "unet"
    beside_names: ClassVar[tuple[str, ...]] = ("controlnet",)

    @property
    def unet(self) -> Any:
        return self.call

    @property
    def control(self) -> Any:
        return self.beside["controlnet"]


def _picture(file: str, height: int, width: int) -> Float[Tensor, "3 h w"]:
    return fitted(load(Path(file))[0], Size(height, width))


def with_controlnet(pipeline: DiffusionPipeline | str, name: str, dtypes: Mapping[str, torch.dtype]) -> Any:
    """A pipeline with the ControlNet of a folder or hub id beside its UNet; the networks are those of the pipeline.

    Args:
        dtypes: as of `load_pipeline`.

    Raises: ValueError where one of them cannot be had, or the pipeline is no StableDiffusionPipeline.
    """
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

    plain = load_pipeline(pipeline, ("StableDiffusionPipeline",), dtypes)
    try:
        controlnet = ControlNetModel.from_pretrained(name, torch_dtype=dtypes.get("controlnet"), use_safetensors=True)
    except Exception as error:  # what stands in a folder decides which kind
        raise unreadable(f"the ControlNet {name!r} can be had neither as a folder nor from the hub", error) from error
    return StableDiffusionControlNetPipeline(**plain.components, controlnet=controlnet, requires_safety_checker=False)
