"""What all families share: a diffusers pipeline with a LoRA policy on its network, each prompt encoded once."""

from __future__ import annotations

import gc
from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from jaxtyping import Float
from torch import Tensor, nn

from flowalign.adapters import LoRA, recomputed
from flowalign.distributed import exchanging
from flowalign.models.base import Latents, Sigma, Sigmas
from flowalign.models.embedding_store import EmbeddingStore
from flowalign.models.encoding import Embedding, Encoded, Told, embeddings_of, stacked
from flowalign.models.fingerprints import config_of, text_facts
from flowalign.models.first_order import first_order
from flowalign.models.loading import load_pipeline
from flowalign.models.memory import Memory, autocast, device_of, encoders_on, finish, load_dtypes, place
from flowalign.models.policies import PolicyModel, check_whole, policy_on
from flowalign.records import Condition
from flowalign.schedules import linear
from flowalign.sharding import spread
from flowalign.whole import Full

Precision = Literal["no", "fp16", "bf16"]
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


class PipelineModel(PolicyModel):
    """A diffusers pipeline with a LoRA policy on its network.

    A family says which pipelines it takes, and how they encode, call the network, and decode.

    Args:
        pipeline: the pipeline, a folder or hub id of one, or an embedded one: shapes, shapes-few-step, shapes-video.
        lora: the policy. None, or `Full` with what to start from, for full fine-tuning: all of the network's weights.
        height, width: of the pictures, in pixels; None for the pipeline's default.
        max_sequence_length: of a prompt in tokens, where the family can choose; None for the pipeline's default.
        negative_prompt: what the unconditional call is told.
        grid: None for the scheduler's own table, as the pipeline samples by default; or a function of the number of
            steps whose sigmas are handed to the scheduler, as the pipeline's own `sigmas` argument, and shifted by it.
        mixed_precision: of the network's calls. The policy stays float32, and so do latents and velocities.
        decode_precision: of the VAE when it decodes.
        gradient_checkpointing: recompute activations in the backward pass instead of keeping them.
        compile: `torch.compile` the network.
        device: None for the pipeline's own device where it was moved, else CUDA if there is one.
        prompts_per_call: prompts in one call of the encoders; shorter batches are padded to it.
        embeddings_gb: prompts' embeddings kept on the host, in 10^9 bytes; those that were not used for longest go.
        memory: what is done to make a big model fit.
        embeddings: a folder to keep them in, so that the next start encodes only what is new; see `EmbeddingStore`.
            T5-XXL's of 256 tokens have 2 MB a prompt in bf16. None for no such folder.
        strength: in (0, 1], of rollouts that start from the prompts' own pictures (`EditingModel`); None for noise.

    Of a folder or hub id the network and the text encoders are read in `mixed_precision`, the VAE in
    `decode_precision`; of a pipeline that is given, the network is cast and the rest stays as it is.

    Raises: ValueError for a pipeline of another family, and for sizes that the network cannot take.
    """

    pipelines: ClassVar[tuple[str, ...]]  # names of diffusers' classes
    network_name: ClassVar[str] = "transformer"
    beside_names: ClassVar[tuple[str, ...]] = ()  # of the pipeline's other networks that a call goes through
    targets: ClassVar[tuple[str, ...]]  # the LoRA's by default, suffixes of module names
    tokens: ClassVar[int] = 0  # of a prompt, where max_sequence_length does not say

    def __init__(
        self,
        pipeline: DiffusionPipeline | str,
        lora: LoRA | Full | None = LoRA(),
        height: int | None = None,
        width: int | None = None,
        max_sequence_length: int | None = None,
        negative_prompt: str = "",
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
        self.start_from(strength)
        self._autocast, self._decode_autocast = DTYPES.get(mixed_precision), DTYPES.get(decode_precision)
        names = (self.network_name, *self.beside_names)
        whole = None if isinstance(lora, LoRA) else self.network_name
        if whole is not None:
            check_whole(memory, mixed_precision == "fp16")
        dtypes = load_dtypes(names, self._autocast, self._decode_autocast, whole)
        self.pipeline: Any = load_pipeline(pipeline, self.pipelines, dtypes)
        self.device = torch.device(device) if device else device_of(self.pipeline)
        memory.check(gradient_checkpointing, compile, self.device)
        self.memory, network = memory, self.module
        self.dtype: torch.dtype = self._autocast or network.dtype  # type: ignore[assignment]  # some parts stay float32
        # autocast would cast frozen weights anew at every call
        place(self.pipeline, names, memory, self._autocast, self.device, whole)
        self.steps_device = torch.device("cpu") if memory.trajectory_on_cpu else None
        self.scale_loss = mixed_precision == "fp16"
        self.lora = lora
        self.policy = policy_on(self.pipeline, self.network_name, lora, self.targets)
        self.policy_folder = self.policy.folder
        parts = {name: getattr(self.pipeline, name) for name in names}
        for part in parts.values():
            finish(part, memory, self.dtype, self.device)
            if gradient_checkpointing:
                part.enable_gradient_checkpointing(recomputed)
        self.sharded = spread(self.pipeline, names, memory.shard, self.device, self.policy.unsharded())
        self.cut_calls(names)
        self.compiled = compile
        calls = {name: torch.compile(part) if compile else part for name, part in parts.items()}
        self.call = calls.pop(self.network_name)
        self.beside: dict[str, Any] = calls
        self.max_sequence_length = self.tokens if max_sequence_length is None else max_sequence_length
        self.negative_prompt, self.grid = negative_prompt, grid
        self.embeddings_limit = embeddings_gb * 1e9
        self.encoded = Encoded(self._encode, prompts_per_call, self.embeddings_limit)
        self.prepare()
        if embeddings is not None:
            self.keep_embeddings(embeddings)
        self.set_size(height, width)

    @property
    def module(self) -> nn.Module:
        """The network that the policy is on."""
        return getattr(self.pipeline, self.network_name)  # type: ignore[no-any-return]

    def prepare(self) -> None:
        """What a family has to find out or refuse before anything is sized; nothing."""

    @abstractmethod
    def encode_texts(self, texts: list[str]) -> tuple[Tensor | None, ...]:
        """The pipeline's embeddings of texts: prompt_embeds, then pooled_prompt_embeds and prompt_mask if any.

        Each has a row for each text, and the same length whatever the texts are.
        """

    def token_limit(self) -> tuple[int, Any]:
        """The most tokens of a prompt that any of the text encoders reads, and its tokenizer."""
        tokenizer = self.pipeline.tokenizer
        return self.max_sequence_length or int(tokenizer.model_max_length), tokenizer

    @abstractmethod
    def predict(self, latents: Latents, sigma: Sigma, told: Told, guidance_scale: float) -> Latents:
        """One call of the network as a velocity; latents are float32, all on the device.

        Args:
            latents: as `seen` gives them.
            sigma: of all rows, or a column with one for each; `timesteps` takes either.
            told: what `encode_texts` gave for each row's prompt, or negative prompt.
            guidance_scale: for networks that are told it; others are guided from outside.
        """

    def seen(self, latents: Latents, condition: Condition) -> Tensor:
        """What the network sees of latents: themselves, or more where a condition stands beside them."""
        return latents

    def encode(self, prompts: Sequence[str], negatives: Sequence[str | None] | None = None) -> Condition:
        """See `Model.encode`. Raises ValueError for a new prompt after `free_encoders`."""
        away = [self.negative_prompt if text is None else text for text in negatives or (None,) * len(prompts)]
        again = self.pipeline.text_encoder is not None
        rows = self.encoded.take([*prompts, *away, self.negative_prompt], again)
        apart = {text: self.negative_of(text, rows[text]) for text in away}
        told = stacked([rows[text] for text in prompts], self.device)
        negative = stacked([apart[text] for text in away], self.device)
        assert told[0] is not None
        return Condition(told[0], told[1], negative[0], negative[1], told[2], negative[2])

    def negative_of(self, text: str, row: Embedding) -> Embedding:
        """What the unconditional call is told, from the embeddings of a negative prompt."""
        return row

    def encoding_settings(self) -> dict[str, Any]:
        """The adapter's own settings that `encode_texts` looks at."""
        return {"max_sequence_length": self.max_sequence_length}

    def keep_embeddings(self, folder: str) -> None:
        if self.encoded.store is None:
            told = self.encoding_settings() | {"prompts_per_call": self.encoded.per_call, "device": self.device.type}
            told |= {"adapter": f"{type(self).__module__}.{type(self).__qualname__}", "precision": str(self.dtype)}
            made_with = {"network": config_of(self.module), **told, **text_facts(self.pipeline)}
            self.encoded.store = store = EmbeddingStore(Path(folder), made_with)
            self.embeddings_folder = store.folder

    def encoding_anew(self) -> AbstractContextManager[None]:
        return self.encoded.anew()

    def _encode(self, texts: list[str]) -> tuple[Tensor | None, ...]:
        with encoders_on(self.pipeline, self.memory, self.device):
            return self.encode_texts(texts)

    def free_encoders(self) -> None:
        """Drop the text encoders; prompts encoded so far stay usable."""
        names = [name for name in self.pipeline.components if name.startswith("text_encoder")]
        self.pipeline.register_modules(**dict.fromkeys(names))
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def full_sigmas(self, steps: int) -> list[float]:
        """See `EditingModel.full_sigmas`; with `grid`, the scheduler's shift of grid(steps) without its final 0."""
        scheduler, shift = self.flow_scheduler(), self.resolution_shift()
        if self.grid is None:
            scheduler.set_timesteps(steps, mu=shift)
        else:
            scheduler.set_timesteps(sigmas=self.grid(steps)[:-1], mu=shift)
        return [float(sigma) for sigma in scheduler.sigmas]

    def train_sigmas(self) -> list[float]:
        """See `Model.train_sigmas`: the scheduler's table of training, shifted once, or as the resolution shifts it."""
        scheduler = self.flow_scheduler()
        points = linear(scheduler.config.num_train_timesteps)[:-1]
        scheduler.set_timesteps(sigmas=points, mu=self.resolution_shift())
        return [float(sigma) for sigma in scheduler.sigmas[:-1]]

    def flow_scheduler(self) -> FlowMatchEulerDiscreteScheduler:
        """The first-order scheduler whose sigmas a rollout takes: the pipeline's own, or its like."""
        return first_order(self.pipeline.scheduler)

    def resolution_shift(self) -> float | None:
        """mu, where the scheduler shifts its sigmas by the resolution."""
        if self.pipeline.scheduler.config.use_dynamic_shifting:
            raise ValueError(
                f"{type(self.pipeline).__name__}'s scheduler shifts by resolution (use_dynamic_shifting), which "
                f"{type(self).__name__} pipelines do not; give it a FlowMatchEulerDiscreteScheduler with a shift"
            )
        return None

    def scheduler_note(self) -> str | None:
        """What the pipeline's own scheduler does that a rollout does not, if anything."""
        if type(self.pipeline.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler":
            return None
        return (
            f"the pipeline ships {type(self.pipeline.scheduler).__name__}; FlowAlign samples by first-order steps on "
            "the same sigmas, which takes more steps for the same detail: compare pictures with those of `sample`"
        )

    def network(
        self, latents: Latents, sigma: Sigma, condition: Condition, negative: bool = False, guidance_scale: float = 1.0
    ) -> Latents:
        return self._predict(self.seen(latents, condition), sigma, embeddings_of(condition, negative), guidance_scale)

    def network_rows(
        self, latents: Latents, sigmas: Sigmas, condition: Condition, negative: bool, guidance_scale: float
    ) -> Latents:
        column = sigmas.to(self.device, torch.float32).view(-1, *(1,) * (latents.ndim - 1))
        return self.network(latents, column, condition, negative, guidance_scale)

    def network_doubled(self, latents: Latents, sigma: float, condition: Condition) -> tuple[Latents, Latents]:
        seen = self.seen(latents, condition)
        told = embeddings_of(condition, True).and_then(embeddings_of(condition, False))
        unconditional, conditional = self._predict(torch.cat([seen, seen]), sigma, told, 1.0).chunk(2)
        return conditional, unconditional

    def _predict(self, latents: Latents, sigma: Sigma, told: Told, guidance_scale: float) -> Tensor:
        latents, told = self.entering(latents.to(self.device)), told.to(self.device)
        with autocast(self.device, self._autocast), exchanging():
            return self.predict(latents, sigma, told, guidance_scale).float()

    def decode(self, latents: Latents) -> Float[Tensor, "b *frames 3 h w"]:
        own = None if self._decode_autocast else self.pipeline.vae.dtype  # autocast wants float32, scaled as such
        with autocast(self.device, self._decode_autocast):
            decoded = self.decode_latents(latents.to(self.device, own))
        return (decoded.float() / 2 + 0.5).clamp(0, 1)

    def decode_latents(self, latents: Latents) -> Float[Tensor, "b *frames 3 h w"]:
        """What the VAE makes of latents, in [-1, 1], as the pipeline scales them for it."""
        config = self.pipeline.vae.config
        shift = getattr(config, "shift_factor", None) or 0.0
        decoded: Tensor = self.pipeline.vae.decode(latents / config.scaling_factor + shift, return_dict=False)[0]
        return decoded

    @torch.no_grad()
    def encode_media(self, pixels: Float[Tensor, "b *frames 3 h w"]) -> Latents:
        own = None if self._decode_autocast else self.pipeline.vae.dtype
        with autocast(self.device, self._decode_autocast):
            return self.encode_latents(pixels.to(self.device, own) * 2 - 1).float()

    def encode_latents(self, pixels: Float[Tensor, "b *frames 3 h w"]) -> Latents:
        """What the VAE makes of pixels in [-1, 1], the mean of its distribution, as `decode_latents` takes it."""
        config = self.pipeline.vae.config
        shift = getattr(config, "shift_factor", None) or 0.0
        return (self.pipeline.vae.encode(pixels).latent_dist.mode() - shift) * config.scaling_factor  # type: ignore[no-any-return]


def timesteps(latents: Tensor, value: Sigma) -> Float[Tensor, " b"]:
    """The time of every row, in float32: what networks of diffusers embed. One for all, or a column of theirs."""
    if isinstance(value, Tensor):
        return value.flatten().to(latents.device, torch.float32)
    return torch.full((len(latents),), value, device=latents.device, dtype=torch.float32)
