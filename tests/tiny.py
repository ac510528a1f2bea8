"""Tiny models of the real classes with random weights, made in memory."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from tokenizers import pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from flowalign.models.base import Model


def byte_tokenizer(length: int = 40) -> CLIPTokenizer:
    """A CLIP tokenizer without merges: every byte is a token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={name: i for i, name in enumerate(names)}, merges=[], model_max_length=length)


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


def small_vae(scaling_factor: float = 0.5, **changes: Any) -> AutoencoderKL:
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
        **changes,
    )


def tiny_sd3() -> StableDiffusion3Pipeline:
    """Two joint blocks of width 32 on 4 x 4 latents, 32 pixels; the same weights at every call; no T5."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        tokenizer = byte_tokenizer()

        def encoder() -> CLIPTextModelWithProjection:
            config = CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                projection_dim=16,
                max_position_embeddings=40,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
            return CLIPTextModelWithProjection(config)

        transformer = SD3Transformer2DModel(
            sample_size=4,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            caption_projection_dim=32,
            pooled_projection_dim=32,
            pos_embed_max_size=8,
            qk_norm="rms_norm",
        )
        for parameter in transformer.parameters():  # as made, the last layers are zero and the velocity is too
            parameter.data.add_(0.05 * torch.randn_like(parameter))
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8, 8, 8, 8),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=32,
            scaling_factor=0.7,
            shift_factor=0.1,
            use_quant_conv=False,
            use_post_quant_conv=False,
            mid_block_add_attention=False,
        )
        pipe = StableDiffusion3Pipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=vae,
            text_encoder=encoder(),
            tokenizer=tokenizer,
            text_encoder_2=encoder(),
            tokenizer_2=tokenizer,
            text_encoder_3=None,
            tokenizer_3=None,
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def randomise_policy(model: Model, scale: float = 0.1) -> None:
    """Move the policy off its start, where LoRA's B is zero and proves nothing."""
    generator = torch.Generator().manual_seed(3)
    for parameter in model.trainable().values():
        parameter.data.add_(scale * torch.randn(parameter.shape, generator=generator))
