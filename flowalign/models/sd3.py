"""Stable Diffusion 3 and 3.5."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from jaxtyping import Float
from torch import Tensor, nn

from flowalign.adapters import LoRA, add_policy, as_reference, policy_parameters, save_policy
from flowalign.models.base import Latents, Model
from flowalign.models.loading import load_pipeline
from flowalign.records import Condition

# Flow-GRPO's targets (arXiv:2505.05470): every attention projection of the joint blocks.
TARGETS = (
    "attn.add_k_proj",
    "attn.add_q_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
    "attn.to_k",
    "attn.to_out.0",
    "attn.to_q",
    "attn.to_v",
)
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


class SD3(Model):
    """A StableDiffusion3Pipeline with a LoRA policy on its transformer.

    Args:
        pipeline: the pipeline, a folder or hub id of one, or "shapes" for the embedded world's.
        lora: the policy.
        height, width: of the pictures, in pixels; None for the pipeline's default.
        max_sequence_length: T5 tokens, which the network attends to even where they are padding. Without a T5 they are
            zeros; 0 then leaves them out.
        negative_prompt: what the unconditional call is told.
        grid: None for the scheduler's own table, as the pipeline samples by default; or a function of the number of
            steps whose sigmas are handed to the scheduler, as the pipeline's own `sigmas` argument, and shifted by it.
        mixed_precision: of the network's calls. The policy stays float32, and so do latents and velocities.
        decode_precision: of the VAE when it decodes.
        gradient_checkpointing: recompute activations in the backward pass instead of keeping them.
        compile: `torch.compile` the transformer.
        device: None for the pipeline's own device where it was moved, else CUDA if there is one.
        prompts_per_call: prompts in one call of the encoders; shorter batches are padded to it.
        embeddings_gb: prompts' embeddings kept on the host, in 10^9 bytes; those that were not used for longest go.
    """

    def __init__(
        self,
        pipeline: StableDiffusion3Pipeline | str,
        lora: LoRA = LoRA(),
        height: int | None = None,
        width: int | None = None,
        max_sequence_length: int = 256,
        negative_prompt: str = "",
        grid: Callable[[int], list[float]] | None = None,
        mixed_precision: Literal["no", "fp16", "bf16"] = "no",
        decode_precision: Literal["no", "fp16", "bf16"] = "no",
        gradient_checkpointing: bool = False,
        compile: bool = False,
        device: str | None = None,
        prompts_per_call: int = 8,
        embeddings_gb: float = 8.0,
    ) -> None:
        loaded = load_pipeline(pipeline, StableDiffusion3Pipeline) if isinstance(pipeline, str) else pipeline
        self.pipeline: Any = loaded
        self.device = torch.device(device) if device else _device_of(self.pipeline)
        self.pipeline.to(self.device)
        self.transformer: nn.Module = self.pipeline.transformer
        for part in (self.pipeline.vae, self.pipeline.text_encoder, self.pipeline.text_encoder_2):
            part.requires_grad_(False).eval()
        if self.pipeline.text_encoder_3 is not None:
            self.pipeline.text_encoder_3.requires_grad_(False).eval()
        self.transformer.eval()
        self._autocast, self._decode_autocast = DTYPES.get(mixed_precision), DTYPES.get(decode_precision)
        if self._autocast is not None:  # autocast would cast frozen weights anew at every call
            nn.Module.to(self.transformer, self._autocast)  # diffusers' own `to` warns that nothing is kept float32
        self._dtype: torch.dtype = self._autocast or self.pipeline.transformer.dtype  # which walks through all modules
        self.scale_loss = mixed_precision == "fp16"
        self.lora = lora
        add_policy(self.pipeline, self.transformer, lora, TARGETS)
        if gradient_checkpointing:
            self.transformer.enable_gradient_checkpointing()  # type: ignore[operator]
        self._call: Any = torch.compile(self.transformer) if compile else self.transformer
        self.max_sequence_length, self.negative_prompt = max_sequence_length, negative_prompt
        self.grid, self.prompts_per_call = grid, prompts_per_call
        factor = self.pipeline.vae_scale_factor
        default = self.pipeline.default_sample_size * factor
        self.height, self.width = height or default, width or default
        for name, size in (("height", self.height), ("width", self.width)):
            if size % (factor * self.pipeline.patch_size):
                raise ValueError(f"{name} must be a multiple of {factor * self.pipeline.patch_size}, got {size}")
        channels = self.transformer.config.in_channels  # type: ignore[union-attr]
        self.latent_shape = (channels, self.height // factor, self.width // factor)
        self.embeddings_limit = embeddings_gb * 1e9
        self._encoded: dict[str, tuple[Tensor, Tensor]] = {}  # those used last at the end

    def encode(self, prompts: Sequence[str]) -> Condition:
        """See `Model.encode`. Raises ValueError for a new prompt after `free_encoders`."""
        wanted = dict.fromkeys([*prompts, self.negative_prompt])
        self._encode_missing([*wanted])
        self._encoded |= {text: self._encoded.pop(text) for text in wanted}
        self._forget(len(wanted))
        rows = zip(*(self._encoded[text] for text in prompts), strict=True)
        embeds, pooled = (torch.stack(one).to(self.device) for one in rows)
        negative, negative_pooled = (one.to(self.device) for one in self._encoded[self.negative_prompt])
        count = len(prompts)
        return Condition(
            embeds,
            pooled,
            negative.expand(count, *negative.shape),
            negative_pooled.expand(count, *negative_pooled.shape),
        )

    @torch.no_grad()
    def _encode_missing(self, prompts: Sequence[str]) -> None:
        missing = [text for text in dict.fromkeys(prompts) if text not in self._encoded]
        if missing and self.pipeline.text_encoder is None:
            raise ValueError(f"prompt {missing[0]!r} was not encoded before the text encoders were freed")
        for start in range(0, len(missing), self.prompts_per_call):
            texts = missing[start : start + self.prompts_per_call]
            # one batch shape for all, so that an embedding does not depend on which prompts come with it
            padded = texts + [texts[-1]] * (self.prompts_per_call - len(texts))
            embeds, _, pooled, _ = self.pipeline.encode_prompt(
                padded,
                None,
                None,
                device=self.device,
                do_classifier_free_guidance=False,
                max_sequence_length=self.max_sequence_length,
            )
            for i, text in enumerate(texts):
                self._encoded[text] = (embeds[i].cpu().clone(), pooled[i].cpu().clone())

    def _forget(self, kept: int) -> None:
        """Drop the embeddings that were not used for longest where all are more than the limit; some stay."""
        size = sum(one.nbytes for one in self._encoded[self.negative_prompt])  # all have one shape
        most = max(kept, int(self.embeddings_limit / size))
        if self.pipeline.text_encoder is not None:  # once freed, none can be made again
            for text in [*self._encoded][: max(len(self._encoded) - most, 0)]:
                del self._encoded[text]

    def free_encoders(self) -> None:
        """Drop the text encoders; prompts encoded so far stay usable."""
        self.pipeline.register_modules(text_encoder=None, text_encoder_2=None, text_encoder_3=None)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def sigmas(self, steps: int) -> list[float]:
        """See `Model.sigmas`; with `grid`, the scheduler's shift of grid(steps) without its final 0."""
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(self.pipeline.scheduler.config)
        if scheduler.config.use_dynamic_shifting:
            raise ValueError("this pipeline's scheduler shifts by resolution (use_dynamic_shifting); SD3's do not")
        if self.grid is None:
            scheduler.set_timesteps(steps)
        else:
            scheduler.set_timesteps(sigmas=self.grid(steps)[:-1])
        return [float(sigma) for sigma in scheduler.sigmas]

    def network(self, latents: Latents, sigma: float, condition: Condition, negative: bool) -> Latents:
        return self._velocity(latents, sigma, *_embeds(condition, negative))

    def network_doubled(self, latents: Latents, sigma: float, condition: Condition) -> tuple[Latents, Latents]:
        (negative, negative_pooled), (embeds, pooled) = _embeds(condition, True), _embeds(condition, False)
        both = torch.cat([negative, embeds]), torch.cat([negative_pooled, pooled])
        unconditional, conditional = self._velocity(torch.cat([latents, latents]), sigma, *both).chunk(2)
        return conditional, unconditional

    def _velocity(self, latents: Latents, sigma: float, embeds: Tensor, pooled: Tensor) -> Latents:
        scale = self.pipeline.scheduler.config.num_train_timesteps
        with self._precision(self._autocast):
            velocity = self._call(
                hidden_states=latents.to(self.device, self._dtype),
                timestep=torch.full((len(latents),), sigma * scale, device=self.device, dtype=torch.float32),
                encoder_hidden_states=embeds.to(self.device, self._dtype),
                pooled_projections=pooled.to(self.device, self._dtype),
                return_dict=False,
            )[0]
        return velocity.float()

    def _precision(self, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, dtype) if dtype else nullcontext()

    def decode(self, latents: Latents) -> Float[Tensor, "b 3 h w"]:
        vae = self.pipeline.vae
        scaled = latents.to(self.device, vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
        with self._precision(self._decode_autocast):
            decoded = vae.decode(scaled, return_dict=False)[0]
        return (decoded.float() / 2 + 0.5).clamp(0, 1)

    def trainable(self) -> dict[str, nn.Parameter]:
        return policy_parameters(self.transformer)

    def reference(self) -> AbstractContextManager[None]:
        return as_reference(self.transformer, self.lora.reference if self.lora.start else "base")

    def save(self, folder: Path) -> None:
        save_policy(self.pipeline, self.transformer, folder)


def _embeds(condition: Condition, negative: bool) -> tuple[Tensor, Tensor]:
    embeds = condition.negative_prompt_embeds if negative else condition.prompt_embeds
    pooled = condition.negative_pooled_prompt_embeds if negative else condition.pooled_prompt_embeds
    if embeds is None or pooled is None:
        raise ValueError("this condition was not encoded by a Stable Diffusion 3 model: it lacks embeddings")
    return embeds, pooled


def _device_of(pipeline: Any) -> torch.device:
    if pipeline.device.type != "cpu" or not torch.cuda.is_available():
        return torch.device(pipeline.device)
    return torch.device("cuda")
