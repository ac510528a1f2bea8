"""A tiny random pipeline of every family, as the conformance suite asks for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from flowalign.models import SD3, PipelineModel, StableDiffusion, StableDiffusionXL
from tests.tiny import byte_tokenizer, tiny_sd3

ALPHAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}  # Stable Diffusion's


@dataclass(frozen=True)
class Case:
    """A family with a tiny pipeline of it.

    make: the pipeline, with the same weights at every call, and with the first-order scheduler that it is compared to.
    adapt: its adapter. options: arguments of both the adapter and of the pipeline's call. steps: of a rollout.
    sizes: what else is asked for: height and width, or frames; {} for the defaults.
    guided: a scale of the family's guidance. packed: our latents as the pipeline takes and gives them.
    unused: modules whose result the network throws away, so that their policy has no gradient.
    """

    name: str
    make: Callable[[], DiffusionPipeline]
    adapt: type[PipelineModel]
    options: Mapping[str, Any] = field(default_factory=dict)
    sizes: tuple[Mapping[str, int], ...] = ({}, {"height": 48, "width": 32})
    steps: int = 5
    guided: float = 4.5
    scale_name: str = "guidance_scale"
    calls: Mapping[str, Any] = field(default_factory=dict)
    packed: Callable[[PipelineModel, Tensor], Tensor] = lambda model, latents: latents
    unused: tuple[str, ...] = ()
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


def text_config(width: int = 16, projection: int = 16) -> CLIPTextConfig:
    tokenizer = byte_tokenizer()
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=projection,
        max_position_embeddings=40,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def small_vae(scaling_factor: float = 0.5) -> AutoencoderKL:
    """A picture of 32 pixels is 4 x 16 x 16."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=scaling_factor,
    )


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
)
