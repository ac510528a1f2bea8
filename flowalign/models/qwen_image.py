"""Qwen-Image."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from flowalign.models.base import Latents, Sigma
from flowalign.models.encoding import Told
from flowalign.models.patches import PatchModel
from flowalign.models.pipeline import timesteps


class QwenImage(PatchModel):
    """A QwenImagePipeline with a LoRA policy on its transformer; arguments are `PipelineModel`'s.

    Guidance keeps each token's length (the pipeline's true_cfg_scale; our guidance_scale is it):

        v = |v_c| / |v_w| v_w,   v_w = v_u + w (v_c - v_u),   |.| over the 4 c numbers of a token

    The pipeline guides only where it is given a negative prompt, and Qwen-Image's authors give " "; ours is "" unless
    negative_prompt says otherwise.

    max_sequence_length counts Qwen2.5-VL's tokens after its template's first, 512 by default. Every prompt is padded to
    it, where the pipeline pads to the longest of its batch: the network does not attend to padding, so a picture is the
    same, and calls have one shape whatever the prompts. They cost the padding, so ask for what the prompts need.

    Raises: ValueError for more tokens than the pipeline's 1024, and for a network with guidance_embeds, which
        diffusers' transformer cannot be told.
    """

    pipelines = ("QwenImagePipeline",)
    edits = True
    tokens = 512
    # those of diffusers' train_dreambooth_lora_qwen_image.py: the pictures' attention projections, not the prompt's
    targets = ("to_k", "to_q", "to_v", "to_out.0")

    def prepare(self) -> None:
        super().prepare()
        if self.pipeline.transformer.config.guidance_embeds:
            raise ValueError(
                "this QwenImageTransformer2DModel says guidance_embeds, but diffusers' class has no layer for it; "
                "take one with guidance_embeds false"
            )
        most = self.pipeline.tokenizer_max_length
        if self.max_sequence_length > most:
            raise ValueError(f"max_sequence_length is {self.max_sequence_length}, but Qwen-Image reads at most {most}")

    def encode_texts(self, texts: list[str]) -> tuple[Tensor | None, ...]:
        pipe, start = self.pipeline, self.pipeline.prompt_template_encode_start_idx
        tokens = pipe.tokenizer(
            [pipe.prompt_template_encode.format(text) for text in texts],
            max_length=start + pipe.tokenizer_max_length,
            padding="max_length",
            padding_side="right",
            truncation=True,
            return_tensors="pt",
        ).to(self.device)
        ids, mask = (one[:, : start + self.max_sequence_length] for one in (tokens.input_ids, tokens.attention_mask))
        states = pipe.text_encoder(
            input_ids=ids,
            attention_mask=mask,
            output_hidden_states=True,
            logits_to_keep=1,  # none is looked at, and all would fill memory
        ).hidden_states[-1]
        told = mask[:, start:].bool()
        return states[:, start:] * told[..., None], None, told

    def combine(self, conditional: Latents, unconditional: Latents, guidance_scale: float) -> Latents:
        guided = self.pack(super().combine(conditional, unconditional, guidance_scale))
        wanted, length = (one.norm(dim=-1, keepdim=True) for one in (self.pack(conditional), guided))
        return self.unpack(guided * (wanted / length), conditional)

    def predict(self, latents: Latents, sigma: Sigma, told: Told, guidance_scale: float) -> Latents:
        if told.mask is None:
            raise ValueError("this condition was not encoded by a Qwen-Image model: it lacks the prompts' masks")
        batch, _, rows, columns = latents.shape
        velocity: Tensor = self.call(
            hidden_states=self.pack(latents).to(self.dtype),
            timestep=timesteps(latents, sigma),
            encoder_hidden_states=told.embeds.to(self.dtype),
            encoder_hidden_states_mask=told.mask,
            img_shapes=[[(1, rows // 2, columns // 2)]] * batch,
            return_dict=False,
        )[0]
        return self.unpack(velocity, latents)

    def _scale(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and std of the VAE's latents, channel by channel."""
        config = self.pipeline.vae.config
        mean, std = (torch.tensor(one).view(-1, 1, 1).to(like) for one in (config.latents_mean, config.latents_std))
        return mean, std

    def encode_latents(self, pixels: Float[Tensor, "b 3 h w"]) -> Latents:
        mean, std = self._scale(pixels)
        made: Tensor = self.pipeline.vae.encode(pixels.unsqueeze(2)).latent_dist.mode()
        return (made[:, :, 0] - mean) / std

    def decode_latents(self, latents: Latents) -> Float[Tensor, "b 3 h w"]:
        mean, std = self._scale(latents)
        video = (latents * std + mean).unsqueeze(2)
        decoded: Tensor = self.pipeline.vae.decode(video, return_dict=False)[0]
        return decoded[:, :, 0]
