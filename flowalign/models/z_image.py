"""Z-Image and Z-Image-Turbo."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from torch.nn.functional import pad

from flowalign.adapters import LoRA
from flowalign.models.base import Latents, Sigma
from flowalign.models.encoding import Told
from flowalign.models.memory import Memory
from flowalign.models.patches import PatchModel
from flowalign.models.pipeline import Precision, timesteps
from flowalign.whole import Full


class ZImage(PatchModel):
    """A ZImagePipeline with a LoRA policy on its transformer; arguments are `PipelineModel`'s, and those below.

    The network is told 1 - sigma and predicts x_0 - eps. Guidance is

        v = v_u + w (v_c - v_u),   shortened to cfg_normalization |v_c| where it is longer

    with w = 1 + the pipeline's guidance_scale, which is 0 where nothing is guided away from: its default 5 is 6 here,
    and Turbo's 0 is 1, as no guidance is for every other family. Whatever is at most 1 is none.

    max_sequence_length counts Qwen3's tokens with those of its chat template, 512 by default; longer prompts are cut.
    The network sees a prompt's own tokens, padded to a multiple of 32 by what it learnt for that. It would also pad to
    the longest prompt of a call, and a GPU's kernels round by shape: the same sample could have another log-prob in
    another micro-batch. Rows therefore go through it one by one, each as it is alone, and attend without a mask. With a
    thousand tokens a row and 6 billion weights that should cost little; it was not measured.

    Args:
        cfg_normalization: the most that guidance may lengthen a sample's velocity, times; 0 for no bound. The
            pipeline's True is 1.
        cfg_truncation: nothing is guided where 1 - sigma is above it, at the end of a grid; 1 guides everywhere.
    """

    pipelines = ("ZImagePipeline",)
    edits = True
    tokens = 512
    # those of diffusers' train_dreambooth_lora_z_image.py: every attention projection, the refiners' too
    targets = ("to_k", "to_q", "to_v", "to_out.0")

    def __init__(
        self,
        pipeline: DiffusionPipeline | str,
        lora: LoRA | Full | None = LoRA(),
        height: int | None = None,
        width: int | None = None,
        max_sequence_length: int | None = None,
        negative_prompt: str = "",
        cfg_normalization: float = 0.0,
        cfg_truncation: float = 1.0,
        grid: Callable[[int], list[float]] | None = None,
        mixed_precision: Precision = "no",
        decode_precision: Precision = "no",
        gradient_checkpointing: bool = False,
        compile: bool = False,
        device: str | None = None,
        prompts_per_call: int = 8,
        embeddings_gb: float = 8.0,
        memory: Memory = Memory(),
        embeddings: str | None = None,
        strength: float | None = None,
    ) -> None:
        if cfg_normalization < 0:
            raise ValueError(f"cfg_normalization must be at least 0, which is no bound, got {cfg_normalization}")
        self.cfg_normalization, self.cfg_truncation = float(cfg_normalization), cfg_truncation
        super().__init__(
            pipeline, lora, height, width, max_sequence_length, negative_prompt, grid, mixed_precision,
            decode_precision, gradient_checkpointing, compile, device, prompts_per_call, embeddings_gb,
            memory, embeddings, strength,
        )  # fmt: skip

    def default_size(self) -> int:
        return 1024

    def latents_of(self, height: int, width: int) -> tuple[int, ...]:
        factor = self.pipeline.vae_scale_factor
        return self.pipeline.transformer.config.in_channels, height // factor, width // factor

    def encode_texts(self, texts: list[str]) -> tuple[Tensor | None, ...]:
        most = self.max_sequence_length
        told, _ = self.pipeline.encode_prompt([*texts], self.device, False, max_sequence_length=most)
        lengths = torch.tensor([len(row) for row in told], device=self.device)
        embeds = torch.stack([pad(row, (0, 0, 0, most - len(row))) for row in told])
        return embeds, None, torch.arange(most, device=self.device) < lengths[:, None]

    def calls(self, guidance_scale: float, sigma: float) -> int:
        return 1 if guidance_scale <= 1 or 1 - sigma > self.cfg_truncation else 2

    def combine(self, conditional: Latents, unconditional: Latents, guidance_scale: float) -> Latents:
        guided = super().combine(conditional, unconditional, guidance_scale)
        if not self.cfg_normalization:
            return guided
        plain, length = (one.flatten(1).norm(dim=1) for one in (conditional, guided))
        return guided * (self.cfg_normalization * plain / length).clamp(max=1)[:, None, None, None]

    def predict(self, latents: Latents, sigma: Sigma, told: Told, guidance_scale: float) -> Latents:
        if told.mask is None:
            raise ValueError("this condition was not encoded by a Z-Image model: it lacks the prompts' masks")
        column = timesteps(latents, 1000 * sigma)
        times = ((1000 - column) / 1000).split(1)  # 1 - sigma, rounded as the pipeline rounds it
        seen, embeds = latents.to(self.dtype).unsqueeze(2), told.embeds.to(self.dtype)
        rows = zip(seen, times, embeds, told.mask, strict=True)
        made = [self.call([row], time, [one[own]], return_dict=False)[0][0] for row, time, one, own in rows]
        return -torch.stack(made).squeeze(2)
