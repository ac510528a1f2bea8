"""A tiny SanaPipeline of the real classes with random weights."""

from __future__ import annotations

from typing import Any

from diffusers import AutoencoderDC, FlowMatchEulerDiscreteScheduler, SanaPipeline, SanaTransformer2DModel
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

from flowalign.models.sana import INSTRUCTION

SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")


def gemma_tokenizer() -> GemmaTokenizer:
    """Every byte is a token, and so is each line of the pipeline's instruction, which else would fill the encoder."""
    names = (*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)))
    made = GemmaTokenizer(vocab={name: i for i, name in enumerate(names)}, merges=[], add_bos_token=True)
    made.add_tokens([*INSTRUCTION])
    return made


def gemma_encoder() -> Gemma2Model:
    config = Gemma2Config(
        vocab_size=len(gemma_tokenizer()),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    return Gemma2Model(config).eval()


def small_dc_ae() -> AutoencoderDC:
    """A picture of 32 pixels is 4 x 16 x 16; a stage of convolutions and one of linear attention, as DC-AE has them."""
    stages: dict[str, Any] = {
        "block_types": ("ResBlock", "EfficientViTBlock"),
        "block_out_channels": (8, 8),
        "qkv_multiscales": ((), (5,)),
        "layers_per_block": (1, 1),
    }
    both = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in stages.items()}
    return AutoencoderDC(
        latent_channels=4, attention_head_dim=2, upsample_block_type="interpolate", scaling_factor=0.41407, **both
    )


def sana_transformer(**changes: Any) -> SanaTransformer2DModel:
    """Two blocks of width 48."""
    settings = {
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 24,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 24,
        "cross_attention_dim": 48,
        "caption_channels": 16,
        "sample_size": 16,
    }
    return SanaTransformer2DModel(**settings | changes)


def tiny_sana(scheduler: Any = None, **changes: Any) -> SanaPipeline:
    """Random weights, drawn anew at every call; with other settings of the transformer if told."""
    return SanaPipeline(
        tokenizer=gemma_tokenizer(),
        text_encoder=gemma_encoder(),
        vae=small_dc_ae(),
        transformer=sana_transformer(**changes),
        scheduler=scheduler or FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
