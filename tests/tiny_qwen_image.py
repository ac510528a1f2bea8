"""A tiny QwenImagePipeline of the real classes with random weights."""

from __future__ import annotations

from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from tokenizers import pre_tokenizers
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def qwen_tokenizer() -> Qwen2Tokenizer:
    """Every byte is a token, and so are a turn's start and end."""
    names = (*sorted(pre_tokenizers.ByteLevel.alphabet()), *SPECIAL)
    made = Qwen2Tokenizer(vocab={name: i for i, name in enumerate(names)}, merges=[])
    made.add_special_tokens({"additional_special_tokens": [*SPECIAL[1:]]})
    return made


def qwen_encoder() -> Qwen2_5_VLForConditionalGeneration:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(qwen_tokenizer()),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rope_parameters": rope,
        },
        vision_config={"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32},
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def qwen_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Qwen-Image's own settings, with a line that starts where tiny pictures do."""
    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=0.9,
        base_image_seq_len=16,
        max_image_seq_len=128,
        shift_terminal=0.02,
    )


def tiny_qwen_image(guidance_embeds: bool = False) -> QwenImagePipeline:
    """Two blocks of width 32 on 4 x 8 x 8 latents, 32 pixels; a short template in front of each prompt."""
    pipe = QwenImagePipeline(
        scheduler=qwen_scheduler(),
        vae=AutoencoderKLQwenImage(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True],
            latents_mean=[0.3, -0.2, 0.1, 0.4],
            latents_std=[1.5, 0.7, 1.1, 2.0],
        ),
        text_encoder=qwen_encoder(),
        tokenizer=qwen_tokenizer(),
        transformer=QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=(4, 6, 6),
        ),
    )
    pipe.prompt_template_encode, pipe.prompt_template_encode_start_idx = "<|im_start|>see:{}<|im_end|>", 5
    pipe.default_sample_size = 8
    return pipe
