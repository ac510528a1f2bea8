"""A tiny ZImagePipeline of the real classes with random weights."""

from __future__ import annotations

from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model

from tests.tiny import small_vae
from tests.tiny_qwen_image import qwen_tokenizer

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{% endif %}"
)


def chat_tokenizer() -> Qwen2Tokenizer:
    made = qwen_tokenizer()
    made.chat_template = CHAT
    return made


def tiny_z_image(shift: float = 3.0, dynamic: bool = False) -> ZImagePipeline:
    """Two layers and a refiner of width 32 on 4 channels, 2 pixels a latent; the default size is the real 1024."""
    encoder = Qwen3Config(
        vocab_size=len(qwen_tokenizer()),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
    )
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift, use_dynamic_shifting=dynamic),
        vae=small_vae(shift_factor=0.1),
        text_encoder=Qwen3Model(encoder),
        tokenizer=chat_tokenizer(),
        transformer=ZImageTransformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=32,
            axes_dims=[4, 6, 6],
            axes_lens=[128, 64, 64],
        ),
    )
