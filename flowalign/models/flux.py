"""FLUX.1 dev and schnell."""

from __future__ import annotations

import torch
from torch import Tensor

from flowalign.models.base import Latents, Sigma
from flowalign.models.encoding import Told
from flowalign.models.patches import PatchModel
from flowalign.models.pipeline import timesteps


class Flux(PatchModel):
    """A FluxPipeline with a LoRA policy on its transformer; arguments are `PipelineModel`'s.

    FLUX.1 dev was distilled with guidance (arXiv:2210.03142): its network is told the guidance scale, 3.5 in the
    pipeline by default, and called once. schnell knows none, and does not look at it. Two calls and a negative prompt,
    the pipeline's true_cfg_scale, are not done: neither model needs them, and `negative_prompt` has no effect.

    max_sequence_length counts T5 tokens, by default 512 for a network that is told its guidance and 256 for schnell,
    as both were published; the network attends to them even where they are padding.
    """

    pipelines = ("FluxPipeline",)
    edits = True
    # the attention projections of diffusers' train_dreambooth_lora_flux.py, in joint and single blocks; it also adapts
    # the joint blocks' feed-forward layers
    targets = (
        "attn.to_k",
        "attn.to_q",
        "attn.to_v",
        "attn.to_out.0",
        "attn.add_k_proj",
        "attn.add_q_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
    )

    def prepare(self) -> None:
        super().prepare()
        self.embeds_guidance = bool(self.pipeline.transformer.config.guidance_embeds)
        self.max_sequence_length = self.max_sequence_length or (512 if self.embeds_guidance else 256)

    def encode_texts(self, texts: list[str]) -> tuple[Tensor | None, ...]:
        embeds, pooled, _ = self.pipeline.encode_prompt(
            texts, device=self.device, max_sequence_length=self.max_sequence_length
        )
        return embeds, pooled

    def calls(self, guidance_scale: float, sigma: float) -> int:
        return 1

    def predict(self, latents: Latents, sigma: Sigma, told: Told, guidance_scale: float) -> Latents:
        if told.pooled is None:
            raise ValueError("this condition was not encoded by a FLUX model: it lacks CLIP's embedding")
        batch, _, rows, columns = latents.shape
        places = self.pipeline._prepare_latent_image_ids(batch, rows // 2, columns // 2, self.device, torch.float32)
        velocity: Tensor = self.call(
            hidden_states=self.pack(latents).to(self.dtype),
            timestep=timesteps(latents, sigma),
            guidance=timesteps(latents, guidance_scale) if self.embeds_guidance else None,
            encoder_hidden_states=told.embeds.to(self.dtype),
            pooled_projections=told.pooled.to(self.dtype),
            txt_ids=torch.zeros(told.embeds.shape[1], 3, device=self.device),
            img_ids=places,
            return_dict=False,
        )[0]
        return self.unpack(velocity, latents)
