"""Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flowalign.models.base import Latents, Sigma
from flowalign.models.encoding import Told
from flowalign.models.pipeline import PipelineModel, timesteps


class SD3(PipelineModel):
    """A StableDiffusion3Pipeline with a LoRA policy on its transformer; arguments are `PipelineModel`'s.

    max_sequence_length counts T5 tokens, 256 by default, which the network attends to even where they are padding.
    Without a T5 they are zeros; 0 then leaves them out.
    """

    pipelines = ("StableDiffusion3Pipeline",)
    tokens = 256
    edits = True
    # Flow-GRPO's targets (arXiv:2505.05470): every attention projection of the joint blocks
    targets = (
        "attn.add_k_proj",
        "attn.add_q_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
        "attn.to_k",
        "attn.to_out.0",
        "attn.to_q",
        "attn.to_v",
    )

    def default_size(self) -> int:
        return int(self.pipeline.default_sample_size * self.pipeline.vae_scale_factor)

    def size_unit(self) -> int:
        return int(self.pipeline.vae_scale_factor * self.pipeline.patch_size)

    def latents_of(self, height: int, width: int) -> tuple[int, ...]:
        factor = self.pipeline.vae_scale_factor
        return self.pipeline.transformer.config.in_channels, height // factor, width // factor

    def encode_texts(self, texts: list[str]) -> tuple[Tensor | None, ...]:
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            texts,
            None,
            None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        return embeds, pooled

    def token_limit(self) -> tuple[int, Any]:
        clip = int(self.pipeline.tokenizer.model_max_length)
        if self.pipeline.text_encoder_3 is None or self.max_sequence_length <= clip:
            return clip, self.pipeline.tokenizer
        return self.max_sequence_length, self.pipeline.tokenizer_3

    def predict(self, latents: Latents, sigma: Sigma, told: Told, guidance_scale: float) -> Latents:
        if told.pooled is None:
            raise ValueError("this condition was not encoded by a Stable Diffusion 3 model: it lacks embeddings")
        velocity: Tensor = self.call(
            hidden_states=latents.to(self.dtype),
            timestep=timesteps(latents, sigma * self.pipeline.scheduler.config.num_train_timesteps),
            encoder_hidden_states=told.embeds.to(self.dtype),
            pooled_projections=told.pooled.to(self.dtype),
            return_dict=False,
        )[0]
        return velocity
