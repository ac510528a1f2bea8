"""The data that travels between modules: frozen records with a shape per field."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from hashlib import sha256
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

C = TypeVar("C", bound="Condition")


@dataclass(frozen=True)
class Interval:
    """One step of a sigma grid, from `sigma` down to `sigma_next`.

    `sigma_max` is the grid's second value: it stands in for sigma = 1 where a formula divides by 1 - sigma.
    """

    index: int
    sigma: float
    sigma_next: float
    sigma_max: float

    @property
    def dt(self) -> float:
        """sigma_next - sigma, negative."""
        return self.sigma_next - self.sigma


def intervals(sigmas: list[float]) -> tuple[Interval, ...]:
    """The steps of a falling sigma grid of n + 1 values, as n intervals."""
    if len(sigmas) < 2 or any(a <= b for a, b in zip(sigmas, sigmas[1:], strict=False)):
        raise ValueError(f"sigmas must fall and have at least two values, got {sigmas}")
    return tuple(Interval(i, sigmas[i], sigmas[i + 1], sigmas[1]) for i in range(len(sigmas) - 1))


@dataclass(frozen=True)
class Condition:
    """What the network is told about each row of a batch; every field has the batch as its first dimension.

    A mask is true where an embedding is a token's, and false where it is padding that the network does not attend to.
    Of a model that starts from a picture, `image` stands beside the latents, and `image_embeds` beside the prompt's.
    `control` is the picture in [0, 1] that a ControlNet looks at. `source` is no such thing: latents at sigma 0 of the
    picture that a rollout starts from, noised in part (`flowalign.models.editing`).
    """

    prompt_embeds: Float[Tensor, "b n d"]
    pooled_prompt_embeds: Float[Tensor, "b p"] | None = None
    negative_prompt_embeds: Float[Tensor, "b n d"] | None = None
    negative_pooled_prompt_embeds: Float[Tensor, "b p"] | None = None
    prompt_mask: Bool[Tensor, "b n"] | None = None
    negative_prompt_mask: Bool[Tensor, "b n"] | None = None
    image: Float[Tensor, "b c *x"] | None = None
    image_embeds: Float[Tensor, "b m e"] | None = None
    control: Float[Tensor, "b 3 h w"] | None = None
    source: Float[Tensor, b * source] | None = None

    def __len__(self) -> int:
        return len(self.prompt_embeds)

    def rows(self: C, index: Int[Tensor, " k"]) -> C:
        """The chosen rows, in the order given; a row may be chosen more than once."""
        return self._map(lambda value: value[index.to(value.device)])

    def to(self: C, device: torch.device | str) -> C:
        """The same condition on another device."""
        return self._map(lambda value: value.to(device))

    def _map(self: C, function: Callable[[Tensor], Tensor]) -> C:
        held = {field.name: getattr(self, field.name) for field in fields(self)}
        changed: dict[str, Any] = {name: None if value is None else function(value) for name, value in held.items()}
        return replace(self, **changed)


@dataclass(frozen=True)
class Step:
    """One stochastic step of a rollout, with all that its replay needs.

    Where a group fans out, `latents` has one row for the whole group, and so one network call; its members' rows of
    `latents_next` follow one another. Rows of `latents` all have the same number of members.
    """

    interval: Interval
    latents: Float[Tensor, p * d]
    latents_next: Float[Tensor, b * d]
    log_probs: Float[Tensor, " b"]

    @property
    def members(self) -> int:
        """Samples per row of `latents`."""
        return len(self.latents_next) // len(self.latents)

    def rows(self, index: Int[Tensor, " k"]) -> Step:
        """The chosen rows of `latents`, each with all its members."""
        samples = expand_rows(index, self.members)
        return Step(self.interval, self.latents[index], self.latents_next[samples], self.log_probs[samples])

    def to(self, device: torch.device | None) -> Step:
        """The same step on another device; None for where it is."""
        held = (self.latents, self.latents_next, self.log_probs)
        return Step(self.interval, *(value.to(device) for value in held))


def expand_rows(index: Int[Tensor, " k"], members: int) -> Int[Tensor, " b"]:
    """The sample rows of the chosen parents: r becomes r * members ... (r + 1) * members - 1."""
    return (index[:, None] * members + torch.arange(members, device=index.device)).flatten()


def join_steps(steps: Sequence[Step]) -> Step:
    """One step out of several of the same interval, rows in order."""
    fields_of = zip(*((step.latents, step.latents_next, step.log_probs) for step in steps), strict=True)
    return Step(steps[0].interval, *(torch.cat(values) for values in fields_of))


@dataclass(frozen=True)
class Trajectory:
    """A rollout's result: the last latents of every sample and the stochastic steps in order.

    `path` holds the latents after every step from the start noise on, and `velocities` the guided velocity at the
    latents of each stochastic step, where they were asked for. `values` holds the reward of the denoised latents at
    each guided step, one for each row of its latents (`flowalign.guidance`).
    """

    latents: Float[Tensor, b * d]
    steps: tuple[Step, ...] = ()
    path: tuple[Tensor, ...] = ()
    velocities: tuple[Tensor, ...] = ()
    values: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Size:
    """Of media, in pixels, and a video's frames; None where the model's own is meant."""

    height: int | None = None
    width: int | None = None
    frames: int | None = None

    @classmethod
    def of(cls, metadata: Mapping[str, Any]) -> Size:
        """What a prompt's record asks for."""
        return cls(metadata.get("height"), metadata.get("width"), metadata.get("frames"))


class PromptSet(ABC):
    """Prompts by their number, of which not all need be in memory."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def rows(self, index: Sequence[int]) -> Prompts:
        """The chosen prompts, in the order given."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Tells this set from any other."""

    @abstractmethod
    def sizes(self) -> frozenset[Size]:
        """All sizes that some prompt asks for, that of prompts which ask for none among them."""

    def all(self) -> Prompts:
        """All prompts, in memory."""
        return self.rows(range(len(self)))

    def some(self, count: int) -> Prompts:
        """All, or of more than `count` about so many, spread evenly."""
        return self.rows(range(0, len(self), -(-len(self) // count)))


@dataclass(frozen=True)
class Prompts(PromptSet):
    """A list of prompts, each with a record of its own (a reward's targets, a category); text need not be unique.

    `groups` numbers the groups that are compared with one another, where samples of a batch belong to some.
    """

    text: tuple[str, ...]
    metadata: tuple[dict[str, Any], ...]
    groups: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if len(self.text) != len(self.metadata):
            raise ValueError(f"{len(self.text)} prompts but {len(self.metadata)} metadata records")
        if self.groups is not None and len(self.groups) != len(self.text):
            raise ValueError(f"{len(self.text)} prompts but {len(self.groups)} group numbers")

    def __len__(self) -> int:
        return len(self.text)

    def rows(self, index: Sequence[int]) -> Prompts:
        groups = None if self.groups is None else tuple(self.groups[i] for i in index)
        return Prompts(tuple(self.text[i] for i in index), tuple(self.metadata[i] for i in index), groups)

    def all(self) -> Prompts:
        return self

    def fingerprint(self) -> str:
        told = json.dumps([self.text, self.metadata], default=lambda value: type(value).__qualname__)
        return f"{len(self)} prompts, SHA-256 {sha256(told.encode()).hexdigest()}"

    def sizes(self) -> frozenset[Size]:
        return frozenset(map(Size.of, self.metadata))

    def negatives(self) -> tuple[str | None, ...]:
        """What each prompt's unconditional call is told, None for the model's own negative prompt."""
        return tuple(row.get("negative_prompt") for row in self.metadata)

    def images(self) -> tuple[str, ...]:
        """The file that each prompt's video starts from; none where no prompt names one.

        Raises: ValueError where some do and others do not.
        """
        named = [row.get("image") for row in self.metadata]
        files = [name for name in named if isinstance(name, str)]
        if files and len(files) < len(named):
            without = next(i for i, name in enumerate(named) if not isinstance(name, str))
            raise ValueError(f"prompt {self.text[without]!r} has no image to start from, others of its batch have one")
        return tuple(files)

    def noise_keys(self, numbers: Sequence[int]) -> list[int]:
        """What each prompt's noise is drawn by when it is not trained on: its seed, else its number."""
        seeds = [row.get("seed") for row in self.metadata]
        return [number if seed is None else seed for seed, number in zip(seeds, numbers, strict=True)]


@dataclass(frozen=True)
class Media:
    """Images [b, 3, h, w] or videos [b, f, 3, h, w] in [0, 1]; videos carry their frames per second.

    `references` holds for each of them the pictures [k, 3, h, w] that it should be like (a subject, a source), if any.
    """

    pixels: Float[Tensor, "b *frames 3 h w"]
    fps: float | None = None
    references: tuple[Tensor, ...] | None = None

    def __post_init__(self) -> None:
        if self.references is not None and len(self.references) != len(self.pixels):
            raise ValueError(f"{len(self.pixels)} media but {len(self.references)} sets of references")

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def is_video(self) -> bool:
        """Whether the pixels have frames."""
        return self.pixels.ndim == 5

    def rows(self, index: list[int]) -> Media:
        """The chosen media, in the order given."""
        references = None if self.references is None else tuple(self.references[i] for i in index)
        return Media(self.pixels[index], self.fps, references)


@dataclass(frozen=True)
class Maps:
    """What a reward has seen at each pixel of its own resolution, for losses that weigh pixels.

    predicted: what it has found in each picture: values, or the logits of classes. errors: how far that is from what
    was wanted, at least 0. counted: the pixels that count.
    """

    predicted: Float[Tensor, "b c h w"]
    errors: Float[Tensor, "b h w"]
    counted: Bool[Tensor, "b h w"]


@dataclass(frozen=True)
class Scores:
    """Rewards of a batch, higher is better. A score that could not be had is not `valid`; its value means nothing.

    `maps` are there where a reward has some, and gradients are asked for.
    """

    total: Float[Tensor, " b"]
    parts: dict[str, Float[Tensor, " b"]]
    valid: Bool[Tensor, " b"]
    maps: Maps | None = None

    def __len__(self) -> int:
        return len(self.total)

    def rows(self, index: Sequence[int]) -> Scores:
        """The chosen samples, in the order given."""
        at = list(index)
        return Scores(self.total[at], {name: value[at] for name, value in self.parts.items()}, self.valid[at])
