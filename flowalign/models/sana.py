"""Sana (arXiv:2410.10629)."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence

import torch
from diffusers import SanaPipeline
from jaxtyping import Float
from torch import Tensor

from flowalign.models.base import Latents, Sigma
from flowalign.models.encoding import Told
from flowalign.models.first_order import first_order, multistep_shift
from flowalign.models.pipeline import PipelineModel, timesteps
from flowalign.records import Condition
from flowalign.schedules import linear

# What the pipeline writes before each prompt (section 3.1 of the paper), though not before a negative prompt.
INSTRUCTION: list[str] = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
PLAIN = "\0"  # before a text that is encoded without the instruction; no prompt has it


class Sana(PipelineModel):
    """A SanaPipeline with a LoRA policy on its transformer; arguments are `PipelineModel`'s.

    max_sequence_length counts Gemma's tokens after the pipeline's own instruction, 300 by default. Sizes are made as
    they are asked for, as by the pipeline's use_resolution_binning=False; those it was trained on are in diffusers'
    tables of aspect ratios (ASPECT_RATIO_1024_BIN ...). Prompts are not cleaned, as by clean_caption=False.

    Sana ships a multistep scheduler (DPM-Solver++, flow_shift 3). Rollouts then take the sigmas of a
    FlowMatchEulerDiscreteScheduler of that shift, by default on 1, 1 - 1/n ... 1/n: DPM-Solver's own, to a thousandth
    before the shift.

    Raises: ValueError for a scheduler without flow sigmas, and for a network that is told the guidance scale, as
        Sana-Sprint's is.
    """

    pipelines = ("SanaPipeline",)
    tokens = 300
    # those of diffusers' train_dreambooth_lora_sana.py: of the linear and of the cross-attention
    targets = ("to_k", "to_q", "to_v")

    def prepare(self) -> None:
        if self.pipeline.transformer.config.guidance_embeds:
            raise ValueError("the transformer wants to be told the guidance scale, and SanaPipeline does not do so")
        first_order(self.pipeline.scheduler)  # raises where it cannot be
        if multistep_shift(self.pipeline.scheduler) is not None:
            self.grid = self.grid or linear

    def default_size(self) -> int:
        return int(self.pipeline.transformer.config.sample_size * self.pipeline.vae_scale_factor)

    def size_unit(self) -> int:
        unit = self.pipeline.vae_scale_factor * self.pipeline.transformer.config.patch_size
        return math.lcm(32, unit)  # the pipeline asks for 32

    def latents_of(self, height: int, width: int) -> tuple[int, ...]:
        factor = self.pipeline.vae_scale_factor
        return self.pipeline.transformer.config.in_channels, height // factor, width // factor

    def encode(self, prompts: Sequence[str], negatives: Sequence[str | None] | None = None) -> Condition:
        away = (self.negative_prompt if text is None else text for text in negatives or (None,) * len(prompts))
        return super().encode(prompts, [PLAIN + text for text in away])

    def encode_texts(self, texts: list[str]) -> tuple[Tensor | None, ...]:
        bare = [text.removeprefix(PLAIN) for text in texts]
        plain = [text.startswith(PLAIN) for text in texts]
        made = {kind: self._told(bare, None if kind else INSTRUCTION) for kind in {*plain}}
        embeds, masks = (torch.stack([made[kind][i][row] for row, kind in enumerate(plain)]) for i in range(2))
        return embeds, None, masks.bool()

    def _told(self, texts: list[str], instruction: list[str] | None) -> tuple[Tensor, Tensor]:
        embeds, mask, _, _ = self.pipeline.encode_prompt(
            texts,
            do_classifier_free_guidance=False,
            device=self.device,
            max_sequence_length=self.max_sequence_length,
            complex_human_instruction=instruction,
        )
        return embeds, mask

    def predict(self, latents: Latents, sigma: Sigma, told: Told, guidance_scale: float) -> Latents:
        if told.mask is None:
            raise ValueError("this condition was not encoded by a Sana model: it lacks the prompts' masks")
        scale = self.pipeline.scheduler.config.num_train_timesteps * self.pipeline.transformer.config.timestep_scale
        made: Tensor = self.call(
            latents.to(self.dtype),
            encoder_hidden_states=told.embeds.to(self.dtype),
            encoder_attention_mask=told.mask,
            timestep=timesteps(latents, sigma * scale),
            return_dict=False,
        )[0]
        return made[:, : latents.shape[1]]  # what else there is, is a variance that no flow has

    def encode_latents(self, pixels: Float[Tensor, "b 3 h w"]) -> Latents:
        return self.pipeline.vae.encode(pixels).latent * self.pipeline.vae.config.scaling_factor  # type: ignore[no-any-return]
