"""Tiny PixArt pipelines of the real classes with random weights."""

from __future__ import annotations

from typing import Any

from diffusers import DDIMScheduler, PixArtAlphaPipeline, PixArtSigmaPipeline, PixArtTransformer2DModel
from transformers import T5Config, T5EncoderModel

from tests.tiny import byte_tokenizer, small_vae


def pixart_ddim(**changes: Any) -> DDIMScheduler:
    """On PixArt's linear table, at DDIM's own steps."""
    return DDIMScheduler(**{"clip_sample": False, "timestep_spacing": "leading"} | changes)


def pixart_transformer(**changes: Any) -> PixArtTransformer2DModel:
    """Two blocks that predict a variance too, of width 48: rows fill whole vectors of a CPU and split in thirds."""
    settings = {
        "num_attention_heads": 2,
        "attention_head_dim": 24,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 2,
        "cross_attention_dim": 48,
        "caption_channels": 16,
        "sample_size": 16,
    }
    return PixArtTransformer2DModel(**settings | changes)


def tiny_pixart(kind: Any = PixArtAlphaPipeline, scheduler: Any = None, **changes: Any) -> Any:
    """Random weights, drawn anew at every call; with other settings of the transformer if told."""
    vocabulary = len(byte_tokenizer())
    config = T5Config(vocab_size=vocabulary, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    return kind(
        tokenizer=byte_tokenizer(),
        text_encoder=T5EncoderModel(config).eval(),  # it has dropout
        vae=small_vae(),
        transformer=pixart_transformer(**changes),
        scheduler=scheduler or pixart_ddim(),
    )


def tiny_pixart_1024(scheduler: Any = None) -> PixArtAlphaPipeline:
    """Told the pictures' size, which pipelines do where the network's own is 128 latents."""
    made: PixArtAlphaPipeline = tiny_pixart(scheduler=scheduler, sample_size=128)
    return made


def tiny_pixart_sigma(scheduler: Any = None) -> PixArtSigmaPipeline:
    made: PixArtSigmaPipeline = tiny_pixart(PixArtSigmaPipeline, scheduler)
    return made
