"""Tiny Stable Diffusion with a ControlNet: 16 x 16 latents of 32 pixels, random weights, none of them zero."""

from __future__ import annotations

from typing import Any

from diffusers import ControlNetModel, DiffusionPipeline, StableDiffusionControlNetPipeline
from torch import nn
from transformers import CLIPTextModel

from tests.families import ddim, seeded, small_unet
from tests.tiny import byte_tokenizer, small_vae, text_config


def small_controlnet(**changes: Any) -> ControlNetModel:
    made = ControlNetModel(
        in_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
        conditioning_embedding_out_channels=(8, 16),  # halved once, as by `small_vae`
        **changes,
    )
    for part in (made.controlnet_cond_embedding.conv_out, made.controlnet_mid_block, *made.controlnet_down_blocks):
        nn.init.normal_(part.weight, std=0.3)  # as made they are zero, and the picture does not matter
    return made


def tiny_controlnet(scheduler: Any = None, **changes: Any) -> DiffusionPipeline:
    """The same weights at every call."""

    def build() -> DiffusionPipeline:
        return StableDiffusionControlNetPipeline(
            vae=small_vae(),
            text_encoder=CLIPTextModel(text_config()),
            tokenizer=byte_tokenizer(),
            unet=small_unet(),
            controlnet=small_controlnet(**changes),
            scheduler=scheduler or ddim(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )

    return seeded(build)()
