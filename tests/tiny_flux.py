"""Tiny FluxPipelines of the real classes with random weights."""

from __future__ import annotations

from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextModel, T5Config, T5EncoderModel

from tests.tiny import byte_tokenizer, small_vae, text_config


def t5_encoder() -> T5EncoderModel:
    config = T5Config(vocab_size=len(byte_tokenizer()), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    return T5EncoderModel(config).eval()  # it has dropout


def flux_scheduler(dynamic: bool) -> FlowMatchEulerDiscreteScheduler:
    """dev's and schnell's own settings, but for a line that starts where tiny pictures do."""
    told = {"base_image_seq_len": 16, "max_image_seq_len": 128}
    return FlowMatchEulerDiscreteScheduler(shift=3.0 if dynamic else 1.0, use_dynamic_shifting=dynamic, **told)


def tiny_flux(guidance: bool = True) -> FluxPipeline:
    """Two joint blocks and a single one of width 32 on 4 x 16 x 16 latents; dev, or schnell without guidance."""
    pipe = FluxPipeline(
        scheduler=flux_scheduler(dynamic=guidance),
        vae=small_vae(shift_factor=0.1),
        text_encoder=CLIPTextModel(text_config()),
        tokenizer=byte_tokenizer(),
        text_encoder_2=t5_encoder(),
        tokenizer_2=byte_tokenizer(64),
        transformer=FluxTransformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=16,
            guidance_embeds=guidance,
            axes_dims_rope=(4, 6, 6),
        ),
    )
    pipe.default_sample_size = 16
    return pipe
