"""Stable Diffusion 1.5, 2.1 and XL, their Turbo models and LCM: UNets on a table of alphas, as rectified flow."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from flowalign.models.alpha_model import AlphaModel
from flowalign.models.alpha_table import norm
from flowalign.models.base import Latents, Sigma
from flowalign.models.encoding import Embedding, Told
from flowalign.models.pipeline import timesteps


class StableDiffusion(AlphaModel):
    """A StableDiffusionPipeline (1.5, 2.1, SD-Turbo, LCM) with a LoRA policy on its UNet; arguments: `PipelineModel`'s.

    So is a LatentConsistencyModelPipeline, as which LCM_Dreamshaper_v7 is kept: the same parts under another name.

    Its UNet may predict eps, v or x_0, or the consistency function: see `AlphaModel`. One that was distilled with
    guidance is told the guidance scale, and called once.
    """

    pipelines: ClassVar[tuple[str, ...]] = ("StableDiffusionPipeline", "LatentConsistencyModelPipeline")
    network_name = "unet"
    targets = ("to_q", "to_k", "to_v", "to_out.0")

    def prepare(self) -> None:
        super().prepare()
        self.embeds_guidance = self.denoiser.config.time_cond_proj_dim is not None

    def size_unit(self) -> int:
        return int(self.pipeline.vae_scale_factor * 2 ** (len(self.pipeline.unet.config.block_out_channels) - 1))

    def encode_texts(self, texts: list[str]) -> tuple[Tensor | None, ...]:
        embeds, _ = self.pipeline.encode_prompt(texts, self.device, 1, False)
        return (embeds,)

    def calls(self, guidance_scale: float, sigma: float) -> int:
        return 1 if self.embeds_guidance else super().calls(guidance_scale, sigma)

    def predict(self, latents: Latents, sigma: Sigma, told: Told, guidance_scale: float) -> Latents:
        scale = self._guidance_embedding(len(latents), guidance_scale) if self.embeds_guidance else None
        x, time = (latents / norm(sigma)).to(self.dtype), timesteps(latents, self.table.timestep(sigma))
        down, middle = self.residuals(x, time, told)
        made: Tensor = self.unet(
            x,
            time,
            encoder_hidden_states=told.embeds.to(self.dtype),
            timestep_cond=scale,
            added_cond_kwargs=self.added(len(latents), told.pooled),
            down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
            return_dict=False,
        )[0]
        return self.velocity_of(made.float(), latents, sigma)

    @property
    def unet(self) -> Any:
        """The UNet as it is called."""
        return self.call

    def residuals(
        self, x: Latents, time: Float[Tensor, " b"], told: Told
    ) -> tuple[tuple[Tensor, ...] | None, Tensor | None]:
        """What is added to the UNet's blocks on the way down and to the one in the middle; nothing."""
        return None, None

    def _guidance_embedding(self, count: int, guidance_scale: float) -> Tensor:
        width = self.denoiser.config.time_cond_proj_dim
        scales = torch.full((count,), guidance_scale - 1)
        told: Tensor = self.pipeline.get_guidance_scale_embedding(scales, embedding_dim=width)
        return told.to(self.device, self.dtype)

    def added(self, count: int, pooled: Tensor | None) -> dict[str, Any] | None:
        """What the UNet is told besides; nothing."""
        return None


class StableDiffusionXL(StableDiffusion):
    """A StableDiffusionXLPipeline (base, Turbo, LCM) with a LoRA policy on its UNet; see `StableDiffusion`.

    The UNet is told that pictures were not cropped and have the size that is made. An empty negative prompt is zeros
    where the pipeline says so (force_zeros_for_empty_prompt), as SDXL's does.
    """

    pipelines = ("StableDiffusionXLPipeline",)

    def encode_texts(self, texts: list[str]) -> tuple[Tensor | None, ...]:
        embeds, _, pooled, _ = self.pipeline.encode_prompt(texts, device=self.device, do_classifier_free_guidance=False)
        return embeds, pooled

    def negative_of(self, text: str, row: Embedding) -> Embedding:
        if text or not self.pipeline.config.force_zeros_for_empty_prompt:
            return row
        return tuple(None if one is None else torch.zeros_like(one) for one in row)

    def added(self, count: int, pooled: Tensor | None) -> dict[str, Any]:
        assert pooled is not None
        size, encoder = (self.height, self.width), self.pipeline.text_encoder_2
        width = int(pooled.shape[-1]) if encoder is None else encoder.config.projection_dim
        ids = self.pipeline._get_add_time_ids(size, (0, 0), size, self.dtype, text_encoder_projection_dim=width)
        return {"text_embeds": pooled.to(self.dtype), "time_ids": ids.to(self.device).repeat(count, 1)}

    def _scale(self, like: Tensor) -> tuple[Tensor, Tensor] | None:
        """Mean and std of the VAE's latents, channel by channel, where it tells them."""
        config = self.pipeline.vae.config
        told = config.get("latents_mean"), config.get("latents_std")
        if None in told:
            return None
        mean, std = (torch.tensor(one).view(1, -1, 1, 1).to(like) for one in told)
        return mean, std

    def encode_latents(self, pixels: Tensor) -> Latents:
        scale, vae = self._scale(pixels), self.pipeline.vae
        if scale is None:
            return super().encode_latents(pixels)
        made: Tensor = vae.encode(pixels).latent_dist.mode()
        return (made - scale[0]) * vae.config.scaling_factor / scale[1]

    def decode_latents(self, latents: Latents) -> Tensor:
        scale, vae = self._scale(latents), self.pipeline.vae
        if scale is None:
            return super().decode_latents(latents)
        whole = latents * scale[1] / vae.config.scaling_factor + scale[0]
        decoded: Tensor = vae.decode(whole, return_dict=False)[0]
        return decoded
