"""PixArt-alpha, PixArt-Sigma and the one-step PixArt-DMD."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from diffusers import DDPMScheduler, DiffusionPipeline, PixArtAlphaPipeline, PixArtTransformer2DModel
from torch import Tensor

from flowalign.adapters import LoRA
from flowalign.models.alpha_model import AlphaModel
from flowalign.models.alpha_table import norm
from flowalign.models.base import Latents, Sigma
from flowalign.models.encoding import Told
from flowalign.models.loading import unreadable
from flowalign.models.memory import Memory, load_dtypes
from flowalign.models.pipeline import DTYPES, Precision, timesteps
from flowalign.whole import Full

CLEANERS = {"bs4": "beautifulsoup4", "ftfy": "ftfy"}  # what the pipelines clean captions with, and where it comes from


class PixArt(AlphaModel):
    """A PixArtAlphaPipeline or PixArtSigmaPipeline with a LoRA policy on its transformer.

    Arguments are `PipelineModel`'s, and those below. The network predicts eps, and a variance that no sampler of ours
    looks at. PixArt-alpha's models for 1024 pixels are told the picture's size and height / width. Sizes are made as
    they are asked for, as by the pipelines' use_resolution_binning=False; those they were trained on are in diffusers'
    tables of aspect ratios (ASPECT_RATIO_1024_BIN ...). max_sequence_length is 120 for alpha and 300 for Sigma.

    Diffusers loads no LoRA into these pipelines. The policy is saved in peft's layout, which
    `peft.PeftModel.from_pretrained(pipe.transformer, folder)` puts on the pipeline's own transformer;
    `LoRA(start=...)` reads it, and files of diffusers' layout too.

    PixArt-DMD (arXiv:2403.04692, after arXiv:2311.18828) makes pictures in one step of an eps model, from unit noise
    at timestep 400, where s = .90 and sigma = .67: `timesteps=(400,)`, one step, no guidance, and `dmd_pipeline`.

    Args:
        timesteps: of the table, falling, where the steps start; the last step ends at sigma 0. None for the
            scheduler's own. The pipeline's own argument, but steps between are of the ODE.
        clean_caption: clean prompts of what the web's captions are full of, with beautifulsoup4 and ftfy. The
            pipelines do so by default where both are installed, and leave prompts as they are elsewhere.

    Raises: ValueError for timesteps that are not in the table or do not fall; for packages that are not installed.
    """

    pipelines = ("PixArtAlphaPipeline", "PixArtSigmaPipeline")
    targets = ("to_q", "to_k", "to_v", "to_out.0")

    def __init__(
        self,
        pipeline: DiffusionPipeline | str,
        lora: LoRA | Full | None = LoRA(),
        height: int | None = None,
        width: int | None = None,
        max_sequence_length: int | None = None,
        negative_prompt: str = "",
        timesteps: tuple[int, ...] | None = None,
        clean_caption: bool = False,
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
    ) -> None:
        missing = [name for module, name in CLEANERS.items() if importlib.util.find_spec(module) is None]
        if clean_caption and missing:
            raise ValueError(f"clean_caption needs {' and '.join(missing)}: pip install {' '.join(missing)}")
        self.timesteps = None if timesteps is None else tuple(timesteps)
        self.clean_caption = clean_caption
        super().__init__(
            pipeline, lora, height, width, max_sequence_length, negative_prompt, grid, mixed_precision,
            decode_precision, gradient_checkpointing, compile, device, prompts_per_call, embeddings_gb,
            memory, embeddings,
        )  # fmt: skip

    def prepare(self) -> None:
        super().prepare()
        if not self.max_sequence_length:  # what the pipelines themselves take
            self.max_sequence_length = 120 if type(self.pipeline).__name__ == "PixArtAlphaPipeline" else 300
        if self.timesteps is None:
            return
        if self.config.get("clip_sample", False):
            raise ValueError(
                f"the pipeline's {type(self.pipeline.scheduler).__name__} clips its samples (clip_sample), which no "
                "step of a flow does; turn it off in the scheduler's config"
            )
        bounded = (len(self.table.sigmas), *self.timesteps, -1)
        if len(bounded) == 2 or any(after >= before for before, after in zip(bounded, bounded[1:], strict=False)):
            raise ValueError(
                f"timesteps must fall, from at most {bounded[0] - 1} to at least 0, got {[*self.timesteps]}"
            )

    def size_unit(self) -> int:
        return int(self.pipeline.vae_scale_factor * self.pipeline.transformer.config.patch_size)

    def sigmas(self, steps: int) -> list[float]:
        """See `Model.sigmas`. Raises: ValueError for another number of steps than of `timesteps`."""
        if self.timesteps is None:
            return super().sigmas(steps)
        if steps != len(self.timesteps):
            raise ValueError(
                f"timesteps {[*self.timesteps]} are {len(self.timesteps)} steps, and {steps} are asked for"
            )
        return [*(float(self.table.sigmas[time]) for time in self.timesteps), 0.0]

    def scheduler_note(self) -> str | None:
        one = self.timesteps is not None and len(self.timesteps) == 1  # what is decoded is x_0 for every scheduler
        return None if one else super().scheduler_note()

    def encoding_settings(self) -> dict[str, Any]:
        return super().encoding_settings() | {"clean_caption": self.clean_caption}

    def encode_texts(self, texts: list[str]) -> tuple[Tensor | None, ...]:
        embeds, mask, _, _ = self.pipeline.encode_prompt(
            texts,
            do_classifier_free_guidance=False,
            device=self.device,
            clean_caption=self.clean_caption,
            max_sequence_length=self.max_sequence_length,
        )
        return embeds, None, mask.bool()

    def predict(self, latents: Latents, sigma: Sigma, told: Told, guidance_scale: float) -> Latents:
        if told.mask is None:
            raise ValueError("this condition was not encoded by a PixArt model: it lacks the prompts' masks")
        made: Tensor = self.call(
            (latents / norm(sigma)).to(self.dtype),
            encoder_hidden_states=told.embeds.to(self.dtype),
            encoder_attention_mask=told.mask,
            timestep=timesteps(latents, self.table.timestep(sigma)),
            added_cond_kwargs=self._added(latents),
            return_dict=False,
        )[0]
        return self.velocity_of(made[:, : latents.shape[1]].float(), latents, sigma)

    def _added(self, latents: Latents) -> dict[str, Any]:
        """The size of the pictures, for networks that were trained with it."""
        if not self.pipeline.transformer.use_additional_conditions:
            return {"resolution": None, "aspect_ratio": None}
        size = torch.tensor([[self.height, self.width]], device=self.device, dtype=self.dtype)
        ratio = torch.tensor([[self.height / self.width]], device=self.device, dtype=self.dtype)
        return {"resolution": size.repeat(len(latents), 1), "aspect_ratio": ratio.repeat(len(latents), 1)}


def dmd_pipeline(
    student: str = "PixArt-alpha/PixArt-Alpha-DMD-XL-2-512x512",
    base: str = "PixArt-alpha/PixArt-XL-2-1024-MS",
    precision: Precision = "no",
) -> PixArtAlphaPipeline:
    """PixArt-DMD as its authors put it together: the student's transformer and scheduler, all else of another model.

    Args:
        student: a folder or hub id with a transformer and a scheduler, which is all that PixArt-DMD's own holds.
        base: a folder or hub id of a PixArtAlphaPipeline, for its T5 and its VAE; its transformer is not read.
        precision: what the transformer and T5 are read as; the VAE is read in float32.

    Raises: ValueError where one of them cannot be had.
    """
    dtypes = load_dtypes(("transformer",), DTYPES.get(precision), None)
    try:
        network = PixArtTransformer2DModel.from_pretrained(
            student, subfolder="transformer", torch_dtype=DTYPES.get(precision, torch.float32), use_safetensors=True
        )
        scheduler = DDPMScheduler.from_pretrained(student, subfolder="scheduler")
        made: PixArtAlphaPipeline = PixArtAlphaPipeline.from_pretrained(
            base, transformer=network, scheduler=scheduler, dtype=dtypes, use_safetensors=True
        )
    except Exception as error:  # what stands in a folder decides which kind
        raise unreadable(f"PixArt-DMD cannot be had from {student!r} and {base!r}", error) from error
    return made
