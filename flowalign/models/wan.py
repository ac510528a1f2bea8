"""Wan 2.1 and 2.2's 5B: text to video, and Wan 2.1's picture to video."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, WanPipeline
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, unpatchify
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flowalign.adapters import LoRA
from flowalign.media import load
from flowalign.models.base import Latents, Sigma
from flowalign.models.encoding import Told
from flowalign.models.first_order import first_order, multistep_shift
from flowalign.models.memory import Memory
from flowalign.models.pipeline import PipelineModel, Precision, timesteps
from flowalign.pictures import to_images
from flowalign.records import Condition
from flowalign.whole import Full

PICTURES_KEPT = 64  # of those that videos start from; one has 12 MB at 81 frames of 480 x 832
Frames = Float[Tensor, "b c f rows columns"]  # latents
Made = Float[Tensor, "b *made"]  # by the network, whose input may have more channels


class Wan(PipelineModel):
    """A WanPipeline with a LoRA policy on its transformer; arguments are `PipelineModel`'s, and those below.

    max_sequence_length counts UMT5 tokens, 512 by default; what a prompt leaves of them is zeros, which the network
    attends to. Wan ships a multistep scheduler (UniPC, flow_shift 3 for 480p and 5 for 720p); rollouts take the sigmas
    of a FlowMatchEulerDiscreteScheduler of that shift. With grid=flowalign.schedules.linear they are UniPC's own, to a
    thousandth before its shift. Wan's VAE decodes one latent frame after another, with gradient.

    Args:
        frames: of a video: 4 k + 1, where the VAE has Wan's 4 frames in one of its latents.
        fps: at which rewards and files take the videos to run; Wan 2.1 was trained at 16, Wan 2.2's 5B at 24.
        decode_checkpointing: recompute each latent frame's activations when `decode` is differentiated.

    Raises: ValueError for a number of frames that the VAE cannot make, for the pairs of transformers that Wan 2.2's 14B
        has, and for a scheduler without flow sigmas.
    """

    fps: float
    pipelines = ("WanPipeline",)
    frames: int
    tokens = 512
    targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")

    def __init__(
        self,
        pipeline: DiffusionPipeline | str,
        lora: LoRA | Full | None = LoRA(),
        height: int = 480,
        width: int = 832,
        frames: int = 81,
        fps: float = 16,
        max_sequence_length: int | None = None,
        negative_prompt: str = "",
        grid: Callable[[int], list[float]] | None = None,
        mixed_precision: Precision = "no",
        decode_precision: Precision = "no",
        decode_checkpointing: bool = False,
        gradient_checkpointing: bool = False,
        compile: bool = False,
        device: str | None = None,
        prompts_per_call: int = 8,
        embeddings_gb: float = 8.0,
        memory: Memory = Memory(),
        embeddings: str | None = None,
    ) -> None:
        self.frames, self.fps, self.decode_checkpointing = frames, fps, decode_checkpointing
        super().__init__(
            pipeline, lora, height, width, max_sequence_length, negative_prompt, grid, mixed_precision,
            decode_precision, gradient_checkpointing, compile, device, prompts_per_call, embeddings_gb,
            memory, embeddings,
        )  # fmt: skip

    def prepare(self) -> None:
        config = self.pipeline.config
        if config.boundary_ratio is not None or self.pipeline.transformer_2 is not None:
            raise ValueError(
                f"this {type(self.pipeline).__name__} has two transformers (Wan 2.2 14B: transformer_2, "
                "boundary_ratio), and a policy is on one; take a Wan 2.1 model or Wan 2.2's 5B"
            )
        first_order(self.pipeline.scheduler)  # raises where it cannot be
        self.check_frames(self.frames)
        if not self.fps > 0:
            raise ValueError(f"fps must be positive, got {self.fps}")
        if self.decode_checkpointing and self.pipeline.vae.use_tiling:
            raise ValueError("decode_checkpointing goes frame by frame, without tiles: leave it, or the VAE's tiling")

    def check_frames(self, frames: int) -> None:
        unit = self.pipeline.vae_scale_factor_temporal
        if frames < 1 or frames % unit != 1:
            nearest = max(round((frames - 1) / unit), 0) * unit + 1
            raise ValueError(f"frames must be {unit} k + 1, got {frames}; the nearest is {nearest}")

    def default_size(self) -> int:
        return 480

    def size_unit(self) -> int:
        patch = self.pipeline.transformer.config.patch_size[-1]
        return math.lcm(16, self.pipeline.vae_scale_factor_spatial * patch)  # the pipeline asks for 16

    def latents_of(self, height: int, width: int) -> tuple[int, ...]:
        space, time = self.pipeline.vae_scale_factor_spatial, self.pipeline.vae_scale_factor_temporal
        return self.pipeline.vae.config.z_dim, (self.frames - 1) // time + 1, height // space, width // space

    def sequences(self) -> dict[str, int]:
        patch, (_, *sides) = self.pipeline.transformer.config.patch_size, self.latent_shape
        told = "videos" if self.frames > 1 else "pictures"
        whole = math.prod(side // unit for side, unit in zip(sides, patch, strict=True))
        return {f"{told} of {self.frames} x {self.height} x {self.width}": whole}

    def scheduler_note(self) -> str | None:
        shift = multistep_shift(self.pipeline.scheduler)
        if shift is None:
            return super().scheduler_note()
        return (
            f"the pipeline ships {type(self.pipeline.scheduler).__name__}, a multistep scheduler; FlowAlign samples by "
            f"first-order steps on FlowMatchEulerDiscreteScheduler's sigmas of its shift, {shift:g}, which takes more "
            "steps for the same detail: compare videos with those of `sample`"
        )

    def encode_texts(self, texts: list[str]) -> tuple[Tensor | None, ...]:
        # WanImageToVideoPipeline's own fails without ftfy (diffusers 0.42); they are the same but for that
        embeds = WanPipeline._get_t5_prompt_embeds(
            self.pipeline, texts, max_sequence_length=self.max_sequence_length, device=self.device
        )
        return (embeds,)

    def predict(self, latents: Latents, sigma: Sigma, told: Told, guidance_scale: float) -> Made:
        image = told.image_embeds
        velocity: Tensor = self.call(
            hidden_states=latents.to(self.dtype),
            timestep=timesteps(latents, sigma * self.pipeline.scheduler.config.num_train_timesteps),
            encoder_hidden_states=told.embeds.to(self.dtype),
            encoder_hidden_states_image=None if image is None else image.to(self.dtype),
            return_dict=False,
        )[0]
        return velocity

    def _scale(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and std of the VAE's latents, channel by channel."""
        config = self.pipeline.vae.config
        mean, std = (
            torch.tensor(one).view(1, -1, 1, 1, 1).to(like) for one in (config.latents_mean, config.latents_std)
        )
        return mean, std

    def encode_latents(self, pixels: Float[Tensor, "b frames 3 h w"]) -> Frames:
        mean, std = self._scale(pixels)
        made: Tensor = self.pipeline.vae.encode(pixels.transpose(1, 2)).latent_dist.mode()
        return (made - mean) / std

    def decode_latents(self, latents: Frames) -> Float[Tensor, "b frames 3 h w"]:
        vae = self.pipeline.vae
        mean, std = self._scale(latents)
        scaled = latents * std + mean
        recompute = self.decode_checkpointing and torch.is_grad_enabled()
        decoded = decode_recomputed(vae, scaled) if recompute else vae.decode(scaled, return_dict=False)[0]
        return decoded.transpose(1, 2)  # type: ignore[no-any-return]


class WanImageToVideo(Wan):
    """A WanImageToVideoPipeline of Wan 2.1: videos that start from a picture; arguments are `Wan`'s.

    A condition carries its pictures from `condition_on`: `image`, which stands beside the latents in the network's
    channels (4 of a mask that is 1 in the first frame, then the VAE's latents of the picture and grey frames after it),
    and `image_embeds`, the CLIP encoder's tokens. max_sequence_length is 512, which the network takes for granted.
    """

    pipelines = ("WanImageToVideoPipeline",)
    takes_image = True
    targets = (*Wan.targets, "add_k_proj", "add_v_proj")

    def prepare(self) -> None:
        super().prepare()
        if self.pipeline.config.expand_timesteps:
            raise ValueError("Wan 2.2's 5B keeps its picture by times of its own: take a picture-to-video Wan 2.1")
        if self.max_sequence_length != self.tokens:
            raise ValueError(f"max_sequence_length must be {self.tokens}, got {self.max_sequence_length}")
        self._pictures: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}  # those used last at the end

    @torch.no_grad()
    def condition_on(self, condition: Condition, images: Sequence[str]) -> Condition:
        found = [self._looked_at(file) for file in images]
        channels, embeds = (torch.stack(kind).to(self.device) for kind in zip(*found, strict=True))
        return replace(condition, image=channels, image_embeds=embeds)

    def _looked_at(self, file: str) -> tuple[Tensor, Tensor]:
        """A picture's channels and tokens, on the host; made once for a size."""
        asked = file, self.height, self.width, self.frames
        made = self._pictures.pop(asked, None) or self._look_at(file)
        self._pictures = {**dict([*self._pictures.items()][-PICTURES_KEPT + 1 :]), asked: made}
        return made

    def _look_at(self, file: str) -> tuple[Tensor, Tensor]:
        pipe, size = self.pipeline, (self.height, self.width)
        picture = to_images(load(Path(file))[0][None])[0]
        frame = pipe.video_processor.preprocess(picture, *size).to(self.device, torch.float32)
        unused = torch.empty(1, *self.latent_shape)
        _, channels = pipe.prepare_latents(
            frame, 1, self.latent_shape[0], *size, self.frames, torch.float32, self.device, latents=unused
        )
        return channels[0].cpu(), pipe.encode_image(picture, self.device)[0].cpu()

    def seen(self, latents: Latents, condition: Condition) -> Tensor:
        if condition.image is None:
            raise ValueError('there is no picture to start from: prompts need an "image", the name of a file')
        return torch.cat([latents.to(condition.image), condition.image], 1)


def decode_recomputed(vae: Any, latents: Frames) -> Float[Tensor, "b 3 frames h w"]:
    """What an AutoencoderKLWan decodes, where the backward pass makes each latent frame's activations anew.

    Between frames only the decoder's own cache is kept: two frames in front of each causal convolution.
    """
    cache: list[Any] = [None] * sum(isinstance(part, WanCausalConv3d) for part in vae.decoder.modules())
    made: list[Tensor] = []
    for frame in vae.post_quant_conv(latents).split(1, 2):
        decoded, *cache = checkpoint(_decode_frame, vae.decoder, frame, not made, *cache, use_reentrant=False)
        made.append(decoded)
    pixels = torch.cat(made, 2)
    if vae.config.patch_size is not None:
        pixels = unpatchify(pixels, vae.config.patch_size)
    return pixels.clamp(-1, 1)


def _decode_frame(decoder: nn.Module, frame: Tensor, first: bool, *cache: Any) -> tuple[Any, ...]:
    """A latent frame's pixels, then the cache after it."""
    held = [*cache]
    decoded = decoder(frame, feat_cache=held, feat_idx=[0], first_chunk=first)
    return decoded, *held
