"""Stable Diffusion 1.5, 2.1 and XL, their Turbo models and LCM: UNets on a table of alphas, as rectified flow."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowalign.models.alpha_table import alpha_table, grid, norm, starts_scaled
from flowalign.models.base import Latents
from flowalign.models.encoding import Embedding
from flowalign.models.pipeline import PipelineModel, timesteps

FIRST_ORDER = ("DDIMScheduler", "EulerDiscreteScheduler", "LCMScheduler")


class StableDiffusion(PipelineModel):
    """A StableDiffusionPipeline (1.5, 2.1, SD-Turbo, LCM) with a LoRA policy on its UNet; arguments: `PipelineModel`'s.

    Latents, sigmas and velocities are rectified flow's (`flowalign.models.alpha_table`), whatever the UNet predicts
    (eps, v or x_0). Under an LCMScheduler the prediction is the consistency function (arXiv:2310.04378, eq. 9)

        x_0 = c_skip x + c_out x_0_hat,   c_skip = d^2 / ((c t)^2 + d^2),   c_out = c t / sqrt((c t)^2 + d^2)

    with d = 0.5 and c its timestep_scaling; the transition `Renoise` is then LCM's own step. A UNet that was distilled
    with guidance is told the guidance scale, and called once.

    Raises: ValueError for `grid`, which is flow-matching models', and where an eps model is asked at alpha = 0.
    """

    pipelines = ("StableDiffusionPipeline",)
    network_name = "unet"
    targets = ("to_q", "to_k", "to_v", "to_out.0")

    def prepare(self) -> None:
        if self.grid is not None:
            raise ValueError(f"grid is for flow-matching models; {type(self.pipeline).__name__} has a table of alphas")
        self.table, self.config = alpha_table(self.pipeline.scheduler), self.pipeline.scheduler.config
        self.consistent = type(self.pipeline.scheduler).__name__ == "LCMScheduler"
        self.embeds_guidance = self.module.config.time_cond_proj_dim is not None  # type: ignore[union-attr]

    def default_size(self) -> int:
        size = self.pipeline.unet.config.sample_size
        return int((size if isinstance(size, int) else size[0]) * self.pipeline.vae_scale_factor)

    def size_unit(self) -> int:
        return int(self.pipeline.vae_scale_factor * 2 ** (len(self.pipeline.unet.config.block_out_channels) - 1))

    def latents_of(self, height: int, width: int) -> tuple[int, ...]:
        factor = self.pipeline.vae_scale_factor
        return self.pipeline.unet.config.in_channels, height // factor, width // factor

    def encode_texts(self, texts: list[str]) -> tuple[Tensor | None, ...]:
        embeds, _ = self.pipeline.encode_prompt(texts, self.device, 1, False)
        return (embeds,)

    def sigmas(self, steps: int) -> list[float]:
        return grid(self.pipeline.scheduler, self.table, steps)

    def start(self, noise: Latents, sigma: float) -> Latents:
        return noise * (sigma if starts_scaled(self.pipeline.scheduler) else norm(sigma))

    def finish(self, latents: Latents, sigma: float) -> Latents:
        return latents / norm(sigma)

    def scheduler_note(self) -> str | None:
        shipped = type(self.pipeline.scheduler).__name__
        if shipped in FIRST_ORDER:
            return None
        if shipped == "EulerAncestralDiscreteScheduler":
            return f"the pipeline ships {shipped}, which adds noise; FlowAlign evaluates by Euler steps without it"
        return (
            f"the pipeline ships {shipped}, of higher order; FlowAlign samples by DDIM steps on its spacing, which "
            "takes more steps for the same detail"
        )

    def calls(self, guidance_scale: float, sigma: float) -> int:
        return 1 if self.embeds_guidance else super().calls(guidance_scale, sigma)

    def predict(
        self,
        latents: Latents,
        sigma: float,
        embeds: Tensor,
        pooled: Tensor | None,
        mask: Tensor | None,
        guidance_scale: float,
    ) -> Latents:
        x, time = latents / norm(sigma), self.table.timestep(sigma)
        told = self._guidance_embedding(len(latents), guidance_scale) if self.embeds_guidance else None
        made: Tensor = self.call(
            x.to(self.dtype),
            timesteps(latents, time),
            encoder_hidden_states=embeds.to(self.dtype),
            timestep_cond=told,
            added_cond_kwargs=self.added(len(latents), pooled),
            return_dict=False,
        )[0]
        return self._velocity(latents, x, made.float(), sigma, time)

    def _velocity(self, latents: Latents, x: Tensor, made: Tensor, sigma: float, time: float) -> Latents:
        alpha, s = (1 - sigma) / norm(sigma), sigma / norm(sigma)
        if self.config.prediction_type == "epsilon":
            if alpha == 0:
                raise ValueError("an eps model says nothing at alpha = 0, where its latents are pure noise")
            denoised, noise = (x - s * made) / alpha, made
        elif self.config.prediction_type == "v_prediction":
            denoised, noise = alpha * x - s * made, alpha * made + s * x
        else:
            denoised, noise = made, (x - alpha * made) / s
        if not self.consistent:
            return noise - denoised
        scaled, width = time * self.config.timestep_scaling, 0.5
        skip, out = width**2 / (scaled**2 + width**2), scaled / (scaled**2 + width**2) ** 0.5
        return (latents - (skip * x + out * denoised)) / sigma

    def _guidance_embedding(self, count: int, guidance_scale: float) -> Tensor:
        width = self.module.config.time_cond_proj_dim  # type: ignore[union-attr]
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

    def decode_latents(self, latents: Latents) -> Tensor:
        config = self.pipeline.vae.config
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is None or std is None:
            return super().decode_latents(latents)
        mean, std = (torch.tensor(one).view(1, -1, 1, 1).to(latents) for one in (mean, std))
        decoded: Tensor = self.pipeline.vae.decode(latents * std / config.scaling_factor + mean, return_dict=False)[0]
        return decoded
