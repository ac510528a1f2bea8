"""A tiny random pipeline of every family, as the conformance suite asks for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from peft import PeftModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from flowalign.models import (
    SD3,
    Flux,
    PipelineModel,
    PixArt,
    QwenImage,
    Sana,
    StableDiffusion,
    StableDiffusionXL,
    Wan,
    ZImage,
)
from tests.tiny import byte_tokenizer, small_vae, text_config, tiny_sd3
from tests.tiny_flux import tiny_flux
from tests.tiny_pixart import pixart_ddim, tiny_pixart, tiny_pixart_1024, tiny_pixart_sigma
from tests.tiny_qwen_image import tiny_qwen_image
from tests.tiny_sana import tiny_sana
from tests.tiny_wan import tiny_wan, tiny_wan_5b
from tests.tiny_z_image import tiny_z_image

ALPHAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}  # Stable Diffusion's


def by_diffusers(pipe: Any, folder: Path) -> None:
    pipe.load_lora_weights(folder)


def by_peft(pipe: Any, folder: Path) -> None:
    """For families that diffusers has no LoRA loader for; it replaces layers of the transformer itself."""
    PeftModel.from_pretrained(pipe.transformer, folder)


@dataclass(frozen=True)
class Case:
    """A family with a tiny pipeline of it.

    make: the pipeline, with the same weights at every call, and with the first-order scheduler that it is compared to.
    adapt: its adapter. options: arguments of both the adapter and of the pipeline's call. steps: of a rollout.
    sizes: what else is asked for: height and width, or frames; {} for the defaults. The first is all tests' own.
    guided: a scale of the family's guidance. scale: what the pipeline calls it, under the name of scale_name.
    packed: our latents as the pipeline takes and gives them.
    unused: modules whose result the network throws away, so that their policy has no gradient.
    guides: whether the guidance scale makes a difference.
    load: puts a saved policy on a plain pipeline.
    """

    name: str
    make: Callable[[], DiffusionPipeline]
    adapt: type[PipelineModel]
    options: Mapping[str, Any] = field(default_factory=dict)
    sizes: tuple[Mapping[str, int], ...] = ({}, {"height": 48, "width": 32})
    steps: int = 5
    guided: float = 4.5
    scale_name: str = "guidance_scale"
    scale: Callable[[float], float] = lambda guidance: guidance
    calls: Mapping[str, Any] = field(default_factory=dict)
    packed: Callable[[PipelineModel, Tensor], Tensor] = lambda model, latents: latents
    unused: tuple[str, ...] = ()
    guides: bool = True
    load: Callable[[Any, Path], None] = by_diffusers
    tolerance: float = 1e-5


def seeded(build: Callable[[], DiffusionPipeline]) -> Callable[[], DiffusionPipeline]:
    """With the same random weights at every call, none of them zero: some networks' last layers start there."""

    def make() -> DiffusionPipeline:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(11)
            pipe = build()
            for part in pipe.components.values():
                for parameter in part.parameters() if isinstance(part, nn.Module) else ():
                    parameter.data.add_(0.02 * torch.randn_like(parameter))
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


def small_unet(cross_attention_dim: int = 16, **more: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=cross_attention_dim,
        attention_head_dim=4,
        norm_num_groups=4,
        **more,
    )


def tiny_sd(scheduler: Any, **unet: Any) -> Callable[[], DiffusionPipeline]:
    def build() -> DiffusionPipeline:
        return StableDiffusionPipeline(
            vae=small_vae(),
            text_encoder=CLIPTextModel(text_config()),
            tokenizer=byte_tokenizer(),
            unet=small_unet(**unet),
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )

    return seeded(build)


def tiny_sdxl(scheduler: Any, **unet: Any) -> Callable[[], DiffusionPipeline]:
    def build() -> DiffusionPipeline:
        added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4, "transformer_layers_per_block": 1}
        return StableDiffusionXLPipeline(
            vae=small_vae(),
            text_encoder=CLIPTextModel(text_config()),
            text_encoder_2=CLIPTextModelWithProjection(text_config()),
            tokenizer=byte_tokenizer(),
            tokenizer_2=byte_tokenizer(),
            unet=small_unet(32, **added, projection_class_embeddings_input_dim=16 + 6 * 4, **unet),
            scheduler=scheduler,
            force_zeros_for_empty_prompt=True,
            add_watermarker=False,
        )

    return seeded(build)


def ddim(**changes: Any) -> DDIMScheduler:
    """As Stable Diffusion 1.5's own config makes it: the grid starts at .917 and ends at .0283."""
    settings = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, **ALPHAS}
    return DDIMScheduler(**settings | changes)


def euler(**changes: Any) -> EulerDiscreteScheduler:
    return EulerDiscreteScheduler(**ALPHAS | {"timestep_spacing": "leading", "steps_offset": 1} | changes)


TURBO = {"timestep_spacing": "trailing", "steps_offset": 0}
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "steps_offset": 0}
VIDEOS = ({"height": 32, "width": 32, "frames": 5}, {"height": 64, "width": 32, "frames": 9})


def packed(model: Any, latents: Tensor) -> Tensor:
    return model.pack(latents)


def less_one(guidance: float) -> float:
    return guidance - 1


PICTURES = ({"height": 32, "width": 32}, {"height": 48, "width": 32})
TOLD, LONGER = {"max_sequence_length": 24}, {"max_sequence_length": 48}  # Z-Image pads to multiples of 32
UNBINNED = {"use_resolution_binning": False, "clean_caption": False}  # sizes and prompts as they are asked
FIRST = DPMSolverMultistepScheduler(beta_start=1e-4, beta_end=0.02, solver_order=1)  # of order 2 as PixArt ships it
TRAILING = pixart_ddim(timestep_spacing="trailing")
CASES = (
    Case(
        "sd3",
        tiny_sd3,
        SD3,
        options={"max_sequence_length": 12},
        unused=("transformer_blocks.1.attn.add_q_proj",),  # the last block keeps no text
    ),
    Case("sd1.5 ddim", tiny_sd(ddim()), StableDiffusion),
    Case("sd1.5 euler", tiny_sd(euler()), StableDiffusion),
    Case("sd2.1 v", tiny_sd(ddim(prediction_type="v_prediction")), StableDiffusion),
    Case("sd2.1 v, zero snr", tiny_sd(ddim(prediction_type="v_prediction", **ZERO_SNR)), StableDiffusion),
    Case("sd-turbo, 1 step", tiny_sd(euler(**TURBO)), StableDiffusion, steps=1),
    Case("sdxl", tiny_sdxl(euler()), StableDiffusionXL),
    Case("sdxl karras", tiny_sdxl(euler(use_karras_sigmas=True)), StableDiffusionXL),
    Case("sdxl-turbo, 4 steps", tiny_sdxl(euler(**TURBO)), StableDiffusionXL, steps=4),
    Case("wan", seeded(tiny_wan), Wan, options={"max_sequence_length": 12}, sizes=VIDEOS),
    Case("wan 2.2 5b", seeded(tiny_wan_5b), Wan, {"max_sequence_length": 12}, VIDEOS),
    Case("flux dev", seeded(tiny_flux), Flux, TOLD, packed=packed),
    Case("flux schnell", seeded(lambda: tiny_flux(guidance=False)), Flux, TOLD, steps=4, packed=packed, guides=False),
    Case(
        "qwen-image",
        seeded(tiny_qwen_image),
        QwenImage,
        TOLD,
        scale_name="true_cfg_scale",
        calls={"negative_prompt": ["", ""]},
        packed=packed,
    ),
    Case("z-image", seeded(tiny_z_image), ZImage, LONGER, PICTURES, scale=less_one),
    Case(
        "z-image, bounded guidance",
        seeded(lambda: tiny_z_image(dynamic=True)),
        ZImage,
        LONGER | {"cfg_normalization": 1.0, "cfg_truncation": 0.6},
        PICTURES,
        scale=less_one,
    ),
    Case("pixart-alpha", seeded(tiny_pixart), PixArt, TOLD, PICTURES, calls=UNBINNED, load=by_peft),
    Case(
        "pixart-alpha 1024, dpm-solver",
        seeded(lambda: tiny_pixart_1024(FIRST)),
        PixArt,
        TOLD,
        PICTURES,
        calls=UNBINNED,
        load=by_peft,
    ),
    Case(
        "pixart-sigma",
        seeded(lambda: tiny_pixart_sigma(TRAILING)),
        PixArt,
        TOLD,
        PICTURES,
        calls=UNBINNED,
        load=by_peft,
    ),
    Case("sana", seeded(tiny_sana), Sana, TOLD, ({}, {"height": 64, "width": 32}), calls=UNBINNED),
)
