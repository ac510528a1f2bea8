"""Tiny WanPipelines of the real classes with random weights."""

from __future__ import annotations

from typing import Any

from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

from tests.tiny import byte_tokenizer

MEAN = [0.3, -0.2, 0.1, 0.4]
STD = [1.5, 0.7, 1.1, 2.0]


def wan_vae(**changes: Any) -> AutoencoderKLWan:
    """4 latent channels; 8 pixels and 4 frames are one latent, as Wan 2.1's."""
    settings = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1, "latents_mean": MEAN}
    return AutoencoderKLWan(**settings | {"latents_std": STD} | changes)


def wan_encoder() -> UMT5EncoderModel:
    config = UMT5Config(vocab_size=len(byte_tokenizer()), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    return UMT5EncoderModel(config).eval()  # it has dropout


def wan_transformer(**changes: Any) -> WanTransformer3DModel:
    """Two blocks of width 24."""
    settings = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 16,
        "freq_dim": 16,
        "ffn_dim": 32,
        "num_layers": 2,
        "rope_max_seq_len": 32,
    }
    return WanTransformer3DModel(**settings | changes)


def tiny_wan(scheduler: Any = None, **changes: Any) -> WanPipeline:
    """Random weights, drawn anew at every call; by default with the scheduler that rollouts are compared to."""
    return WanPipeline(
        tokenizer=byte_tokenizer(),
        text_encoder=wan_encoder(),
        vae=changes.pop("vae", None) or wan_vae(),
        scheduler=scheduler or FlowMatchEulerDiscreteScheduler(shift=5.0),
        transformer=changes.pop("transformer", None) or wan_transformer(),
        **changes,
    )


def tiny_wan_5b() -> WanPipeline:
    """As Wan 2.2's 5B is made: a residual VAE of patches of 2 pixels, and a time for each of the network's tokens."""
    vae = wan_vae(is_residual=True, patch_size=2, in_channels=12, out_channels=12, scale_factor_spatial=16)
    return tiny_wan(vae=vae, expand_timesteps=True)


def tiny_wan_i2v(**changes: Any) -> WanImageToVideoPipeline:
    """As Wan 2.1's: the picture's latents and their mask beside the noise, and the tokens of a CLIP."""
    width = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    return WanImageToVideoPipeline(
        tokenizer=byte_tokenizer(),
        text_encoder=wan_encoder(),
        vae=wan_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        image_processor=CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32),
        image_encoder=CLIPVisionModel(CLIPVisionConfig(**width, image_size=32, patch_size=16)),
        transformer=wan_transformer(in_channels=4 + 4 + 4, image_dim=16, added_kv_proj_dim=24),
        **changes,
    )
