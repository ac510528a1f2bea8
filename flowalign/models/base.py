"""What every model is to the rest of the library: a velocity field that speaks rectified flow, with a policy to train.

x_sigma = (1 - sigma) x_0 + sigma eps,   velocity = eps - x_0,   sigma falls from 1 (noise) to 0 (data)
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from flowalign.accounting import Meter
from flowalign.meeting import meeting
from flowalign.out_of_memory import ADVICE, CallSize
from flowalign.records import Condition, Prompts, Size
from flowalign.schedules import linear

Latents = Float[Tensor, "b *d"]
Sigma = float | Float[Tensor, "b *ones"]  # one for all rows, or one for each as a column beside the latents
Sigmas = Float[Tensor, " b"]
Older = Callable[[], Mapping[str, Tensor]]  # weights by name


class Model(ABC):
    """A generator with a policy. Latents are float32 [b, *latent_shape]; so are velocities."""

    latent_shape: tuple[int, ...]
    device: torch.device
    fps: float | None = None  # frames per second of a video model's media
    embeddings_limit: float = math.inf  # bytes of prompts' embeddings that are kept, on the host
    embeddings_folder: Path | None = None  # where they are kept on a disk too
    steps_device: torch.device | None = None  # where an epoch's steps wait for their update; None for where they are
    takes_image: bool = False  # whether prompts name pictures that the model's media start from
    policy_folder: str = "lora"  # what the policy's weights are written to, in a run's folder
    sharded: bool = False  # its weights are in parts on several processes, which join in each other's calls
    callers: int = 1  # consecutive processes that make each call of its network together; see `split_calls`
    scale_loss: bool = False  # gradients pass through fp16, whose small numbers vanish unless scaled up

    @cached_property
    def meter(self) -> Meter:
        """Counts this model's network calls."""
        return Meter()

    @cached_property
    def decode_size(self) -> CallSize:
        """How many samples are decoded at once, once memory has run out."""
        return CallSize("decoding", ADVICE["decode"])

    @abstractmethod
    def encode(self, prompts: Sequence[str], negatives: Sequence[str | None] | None = None) -> Condition:
        """One row per prompt, in order; a prompt whose embeddings are still kept is not encoded again.

        negatives: what each row's unconditional call is told; None for the model's own negative prompt.
        """

    def keep_embeddings(self, folder: str) -> None:  # noqa: B027  # not every model encodes
        """Keep prompts' embeddings in a folder too, for the next start, unless one was named already; here nothing.

        Raises: OSError where the folder can be neither found nor made.
        """

    def encoding_anew(self) -> AbstractContextManager[None]:
        """While entered, no embedding is read from a disk or written to it: to measure what a new one takes."""
        return nullcontext()

    def condition(self, prompts: Prompts) -> Condition:
        """What the network is told of prompts, one row for each; with their pictures, if the model starts from them."""
        told, images = self.encode(prompts.text, prompts.negatives()), self.images(prompts)
        return self.condition_on(told, images) if images else told

    def images(self, prompts: Prompts) -> tuple[str, ...]:
        """The files that the prompts' media start from; none for a model that does not look at them."""
        return prompts.images() if self.takes_image else ()

    def condition_on(self, condition: Condition, images: Sequence[str]) -> Condition:
        """The same condition, with pictures to start from: a file for each row.

        Raises: ValueError for a model that starts from none.
        """
        raise ValueError(f"{type(self).__name__} starts from no picture; it takes prompts without an image")

    @abstractmethod
    def sigmas(self, steps: int) -> list[float]:
        """The grid of `steps` steps, steps + 1 values, that the pipeline itself would sample on."""

    @abstractmethod
    def network(
        self, latents: Latents, sigma: float, condition: Condition, negative: bool = False, guidance_scale: float = 1.0
    ) -> Latents:
        """One call of the network as a velocity in float32, told the prompt or, if `negative`, the negative prompt.

        guidance_scale: for a network that is told it, and then guided by one call; others do not look at it.
        """

    def network_rows(
        self, latents: Latents, sigmas: Sigmas, condition: Condition, negative: bool, guidance_scale: float
    ) -> Latents:
        """`network` of rows that each have a sigma of their own; here one call for each distinct one.

        Args:
            sigmas: in double precision, so that a grid's own values are found again.
        """
        made, places = list[Tensor](), list[Tensor]()
        for sigma in sigmas.unique():
            at = (sigmas == sigma).nonzero().flatten()
            rows = latents[at.to(latents.device)]
            made.append(self.network(rows, float(sigma), condition.rows(at), negative, guidance_scale))
            places.append(at)
        whole: Tensor = torch.cat(made)[torch.cat(places).argsort().to(latents.device)]
        return whole

    @abstractmethod
    def network_doubled(self, latents: Latents, sigma: float, condition: Condition) -> tuple[Latents, Latents]:
        """The conditional and the unconditional velocity from one call of twice the batch."""

    @abstractmethod
    def decode(self, latents: Latents) -> Float[Tensor, "b *frames 3 h w"]:
        """Pictures in [0, 1], differentiable in the latents."""

    @torch.no_grad()
    def decode_rows(self, latents: Latents, rows: int) -> Float[Tensor, "b *frames 3 h w"]:
        """`decode` without gradient, so many rows at a time; half as many from then on where memory runs out."""

        def some(at: range) -> Tensor:
            self.meter.count("decode")
            return self.decode(latents[at.start : at.stop])

        return torch.cat(self.decode_size.apart(len(latents), rows, some))

    def encode_media(self, pixels: Float[Tensor, "b *frames 3 h w"]) -> Latents:
        """Latents at sigma 0 of media in [0, 1] that have the model's size, without gradient: `decode` turned round.

        Raises: ValueError for a model that has no encoder of media.
        """
        raise ValueError(f"{type(self).__name__} has no encoder of pictures or videos")

    @abstractmethod
    def trainable(self) -> dict[str, nn.Parameter]:
        """The policy's parameters by name, in a fixed order."""

    @abstractmethod
    def reference(self) -> AbstractContextManager[None]:
        """While entered, the network is the reference: the policy's adapter off, or a frozen copy of its start."""

    def as_now(self) -> AbstractContextManager[None]:
        """What runs the network later as it runs now, policy or reference, for calls that a backward pass makes anew.

        By default nothing; of a model whose `reference` does something, that.
        """
        return nullcontext()

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write the policy's weights in the layout that the plain pipeline loads."""

    def export(self) -> Callable[[Path], None]:
        """What `save` is to be called by, on one process or more, while the weights are what they are now.

        All processes ask for it together.
        """
        return self.save

    def keep(self, start: bool, older: bool, values: Older) -> None:  # noqa: B027  # most need not
        """Have at hand from now on what will be called; before any training, by all processes together.

        Args:
            start: whether `reference` is what is there now. older: whether `as_older` is what `values` give then.
        """

    def as_older(self) -> AbstractContextManager[None] | None:
        """While entered, the network has an older policy's weights; None where the policy's own may be changed for it.

        They may not be where other processes can join in a call with theirs.
        """
        return None

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a loss to that of the policy's parameters."""
        meeting().backward(loss) if self.sharded else loss.backward()

    def slope(self, total: Tensor, at: Latents) -> Latents:
        """The gradient of a number at latents that the network was given."""
        return meeting().slope(total, at) if self.sharded else torch.autograd.grad(total, at)[0]

    def media_size(self, asked: Size) -> Size:
        """What is made where this size is asked for; `Size()` of a model that has one size only.

        Raises: ValueError for a size that the model cannot make.
        """
        if asked != Size():
            raise ValueError(f"{type(self).__name__} makes media of one size; a prompt asks for {asked}")
        return asked

    def sized(self, size: Size) -> AbstractContextManager[None]:
        """While entered, `media_size(size)` is the model's own: of media, `latent_shape`, `sigmas` and all calls."""
        return nullcontext()

    def train_sigmas(self) -> list[float]:
        """The sigmas that the network has been trained on, falling, without 0: evenly spaced in its own time."""
        return linear(1000)[:-1]

    def training_weights(self, sigmas: Sigmas) -> Sigmas:
        """What a velocity's squared error is multiplied by, to be the loss that the network was trained with; 1."""
        return torch.ones_like(sigmas)

    def check_prompts(self, prompts: Prompts) -> None:  # noqa: B027  # most models take any
        """Raises: ValueError for a prompt whose record lacks what the model makes its media from."""

    def start(self, noise: Latents, sigma: float, condition: Condition | None = None) -> Latents:
        """Latents at the grid's first sigma from unit noise, as the pipeline itself starts there.

        condition: of the same rows; a model whose rollouts start from pictures finds them there.
        """
        return noise

    def finish(self, latents: Latents, sigma: float) -> Latents:
        """What the pipeline decodes, from latents at the grid's last sigma, which need not be 0."""
        return latents

    def calls(self, guidance_scale: float, sigma: float) -> int:
        """Network calls of one guided velocity: two, or one at scales up to 1, no guidance as in diffusers."""
        return 1 if guidance_scale <= 1.0 else 2

    def combine(self, conditional: Latents, unconditional: Latents, guidance_scale: float) -> Latents:
        """v_u + w (v_c - v_u), classifier-free guidance (arXiv:2207.12598), or the family's own rule."""
        return unconditional + guidance_scale * (conditional - unconditional)

    def velocity(self, latents: Latents, sigma: float, condition: Condition, guidance_scale: float = 1.0) -> Latents:
        """The guided velocity, from one call of twice the batch where guidance takes two.

        For what is not replayed: `velocity_split` is the replayed one.
        """
        calls = self.calls(guidance_scale, sigma)
        self.meter.network(calls * len(latents))
        if calls == 1:
            return self.network(latents, sigma, condition, False, guidance_scale)
        return self.combine(*self.network_doubled(latents, sigma, condition), guidance_scale)

    def velocity_split(
        self,
        latents: Latents,
        sigma: float,
        condition: Condition,
        guidance_scale: float = 1.0,
        unconditional_grad: bool = False,
    ) -> Latents:
        """The same velocity from two calls of the batch's own shape, the unconditional one without gradient.

        A rollout that is replayed with gradient must make the calls that the replay makes, or rounding alone moves the
        ratio. Flow-GRPO's authors detach the unconditional half too; Flow-Factory does not (`unconditional_grad`).
        """
        self.meter.network(len(latents))
        conditional = self.network(latents, sigma, condition, False, guidance_scale)
        if self.calls(guidance_scale, sigma) == 1:
            return conditional
        with torch.set_grad_enabled(unconditional_grad and torch.is_grad_enabled()):
            self.meter.network(len(latents))
            unconditional = self.network(latents, sigma, condition, True, guidance_scale)
        return self.combine(conditional, unconditional, guidance_scale)

    def velocity_rows(
        self,
        latents: Latents,
        sigmas: Sigmas,
        condition: Condition,
        guidance_scale: float = 1.0,
        unconditional_grad: bool = False,
    ) -> Latents:
        """`velocity_split` of rows that each have a sigma of their own, as where clean latents are noised anew."""
        self.meter.network(len(latents))
        conditional = self.network_rows(latents, sigmas, condition, False, guidance_scale)
        values, places = sigmas.unique(return_inverse=True)
        guided = torch.tensor([self.calls(guidance_scale, float(sigma)) > 1 for sigma in values])[places]
        if not guided.any():
            return conditional
        with torch.set_grad_enabled(unconditional_grad and torch.is_grad_enabled()):
            self.meter.network(len(latents))
            unconditional = self.network_rows(latents, sigmas, condition, True, guidance_scale)
        chosen = guided.to(conditional.device).view(-1, *(1,) * (conditional.ndim - 1))
        return self.combine(conditional, unconditional, guidance_scale).where(chosen, conditional)
