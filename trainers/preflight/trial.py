"""One tiny step, measured and thrown away: the policy, the trainer's record and the run folder stay as they are.

The calls have the shapes of the run's own, so that what they take and need is what the run's will; each is made once
to warm up and once to be measured. The first group's pictures are those that the run's first epoch will make.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from flowalign.accounting import Meter
from flowalign.media import shown
from flowalign.models.base import Model
from flowalign.pictures import to_bytes
from flowalign.randomness import keyed_globals
from flowalign.records import Media, Prompts, Scores, intervals
from flowalign.rollout import Policy, rollout
from flowalign.sample import start_noise
from flowalign.schedules import Path
from flowalign.transitions import ODE
from flowalign.videos import stills
from rewards.base import Reward
from trainers.batch import Batch, detached
from trainers.state import Collected

if TYPE_CHECKING:
    from trainers.base import Trainer

NEW_PROMPTS = 16  # encoded to see how long one takes
GLANCE = 2  # steps of the evaluation's call that are made: all of them cost the same


class Seen(Reward):
    """The reward itself, which remembers the pictures it is shown, in 8 bits: of videos strips of frames.

    What that takes is booked apart, as a phase that no run has.
    """

    def __init__(self, reward: Reward, meter: Meter) -> None:
        self.reward, self.name, self.differentiable = reward, reward.name, reward.differentiable
        self.card, self.meter = reward.card, meter
        self.pixels: list[Tensor] = []
        self.first: list[Tensor] = []

    def score(self, media: Media, prompts: Prompts) -> Scores:
        with self.meter.phase("preflight"):
            self.pixels.append(to_bytes(stills(media.pixels)))
            self.first = self.first or [to_bytes(media.pixels[0])]
        return self.reward.score(media, prompts)


@dataclass(frozen=True)
class Rollouts:
    """The first samples: of a trainer by groups whole groups, as its first micro-batches hold them; one at least.

    advantages: one per sample, 0 for one without a valid score; where a method gives each step its own, their mean.
    Without groups, the scores. heading, captions: of the contact sheet, and of its pictures.
    pixels: the first group's, of videos strips of frames. medium: the first picture or video, in 8 bits.
    repeatable: whether the same pictures got the same scores the second time.
    Seconds: per row of a network call; per sample for decoding and scoring, its completions among them.
    """

    batch: Batch
    advantages: Float[Tensor, " b"]
    heading: str
    captions: tuple[str, ...]
    pixels: Float[Tensor, "g 3 h w"]
    medium: UInt8[Tensor, "*frames 3 height width"]
    repeatable: bool
    seconds_per_row: float
    seconds_per_decode: float
    seconds_per_score: float

    @property
    def group_ids(self) -> Int[Tensor, " b"]:
        """The group of each sample."""
        return self.batch.group_ids

    @property
    def scores(self) -> Scores:
        """Of all samples."""
        return self.batch.scores

    @property
    def first(self) -> Bool[Tensor, " b"]:
        """Which samples are the first group's."""
        return self.group_ids == 0


@dataclass(frozen=True)
class Learning:
    """One micro-batch of the update.

    off: the largest distance of a ratio from 1, nan where the method has none; the policy is still the one that
    sampled, so that it should be 0. clipped: the share of samples whose ratio is clipped. seconds_per_step: of one
    trained step of a micro-batch; of a method that goes back through the rollout, of all of it.
    flat: all advantages were 0, and it was measured with advantages of 1.
    """

    loss: float
    grad_norm: float
    off: float
    clipped: float
    seconds_per_step: float
    flat: bool


@dataclass(frozen=True)
class Judging:
    """One call of the evaluation. parts: of its reward. Seconds: per row of a network call, per picture made."""

    parts: tuple[str, ...]
    seconds_per_row: float
    seconds_per_picture: float


@dataclass(frozen=True)
class Encoding:
    """What a new prompt takes: seconds, and bytes that its embedding holds from then on."""

    seconds: float
    size: int


@dataclass(frozen=True)
class Sampled:
    """The micro-batches that hold the first group, and what is told of them, as in `Rollouts`."""

    parts: list[Collected]
    pixels: Float[Tensor, "g 3 h w"]
    medium: UInt8[Tensor, "*frames 3 height width"]
    repeatable: bool
    seconds_per_row: float
    seconds_per_decode: float
    seconds_per_score: float


def sample_first(trainer: Trainer, clean: bool = False) -> Sampled:
    """Roll out and score the first group: the first micro-batch once to warm up, then all of them to be measured.

    Args:
        clean: as of `Collection.collect`.
    """
    model, size = trainer.model, trainer.sampling.group_size
    reward = Seen(trainer.reward, model.meter)
    collection = trainer.collector(reward)
    epoch = collection.epoch(0)
    with trainer.sampler():
        before = collection.collect(epoch, 0, clean)
        reward.pixels.clear()
        model.meter.take()
        many = -(-(size // epoch.members) // trainer.sampling.batch_size)
        parts = [collection.collect(epoch, index, clean) for index in range(many)]
    _, rows, seconds = model.meter.take()
    made = sum(len(part.scores) for part in parts)
    return Sampled(
        parts,
        torch.cat(reward.pixels)[:size].float() / 255,
        reward.first[0],
        same(before.scores, parts[0].scores),
        (seconds["rollout"] + seconds.get("completion", 0.0) + seconds.get("guidance", 0.0)) / rows.cost,
        seconds["decode"] / made,
        seconds["reward"] / made,
    )


def encode_some(trainer: Trainer) -> Encoding:
    """Encode prompts of the first epoch, whether or not they are on a disk."""
    model, epoch = trainer.model, trainer.collection.epoch(0)
    texts = list(dict.fromkeys(trainer.collection.told(epoch.prompts).text))
    others = texts[1 : 1 + NEW_PROMPTS]
    with model.encoding_anew():
        told = model.encode(texts[:1])
        seconds = timed(model, lambda: model.encode(others)) / len(others) if others else 0.0
    known = [told.prompt_embeds, told.pooled_prompt_embeds]
    return Encoding(seconds, sum(value[0].nbytes for value in known if value is not None))


def timed(model: Model, action: Callable[[], object]) -> float:
    """Seconds that an action takes, the device's work included."""
    model.meter.take()
    started = time.perf_counter()
    action()
    model.meter.take()  # waits for the device
    return time.perf_counter() - started


def caption(before: str, scores: Scores, sample: int) -> str:
    """Of a sample's picture, with its scores."""
    if not scores.valid[sample]:
        return "no valid score"
    parts = {name: float(column[sample]) for name, column in scores.parts.items()}
    known = [f"{name.split('/')[-1]} {value:.3g}" for name, value in parts.items() if math.isfinite(value)]
    return "\n".join([f"{before}score {float(scores.total[sample]):.4g}", ", ".join(known)])


def same(one: Scores, other: Scores) -> bool:
    """Whether scores are equal to the last bit."""
    pairs = [(one.total, other.total), *((value, other.parts[name]) for name, value in one.parts.items())]
    return all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs)


def gradient_norm(trainer: Trainer) -> float:
    """Of the gradients that are there, without a loss scale."""
    optimizer = trainer.optimizer
    grads = [value.grad for value in optimizer.parameters.values() if value.grad is not None]
    norm = float(torch.stack([grad.double().norm() for grad in grads]).norm()) if grads else 0.0
    return norm / (optimizer.scaler.get_scale() if optimizer.scaler.is_enabled() else 1.0)


def judge(trainer: Trainer) -> Judging | None:
    """The first steps of one call of the evaluation, its decode and its scores; None where there is no evaluation."""
    if trainer.evaluator.prompts is None:
        return None
    call = trainer.evaluator.calls()[0]
    with trainer.model.sized(call.size):
        return _judge(trainer, trainer.evaluator.prompts.rows(call.rows), call.rows)


def _judge(trainer: Trainer, told: Prompts, index: Sequence[int]) -> Judging:
    evaluator, model = trainer.evaluator, trainer.model
    condition = model.condition(told)
    sigmas = model.sigmas(evaluator.steps)[: GLANCE + 1]
    path, policy = Path((ODE(),) * len(intervals(sigmas))), Policy(evaluator.guidance_scale)
    noise = start_noise(model, trainer.seed, "evaluation", told.noise_keys(index)).to(model.device)
    latents, scores = noise, list[Scores]()

    def sample() -> None:
        nonlocal latents
        latents = rollout(model, condition, noise, sigmas, path, policy).latents

    @torch.no_grad()
    def look() -> None:
        pixels = model.decode(latents)
        with keyed_globals(trainer.seed, "evaluation_reward", 0):
            scores.append(detached(evaluator.reward(shown(pixels, told, model.fps), told)))

    sample()
    sampled, looked = timed(model, sample), min(timed(model, look), timed(model, look))
    rows = len(index) * sum(model.calls(evaluator.guidance_scale, sigma) for sigma in sigmas[:-1])
    return Judging(tuple(scores[-1].parts), sampled / rows, looked / len(index))


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that tensors have taken on a GPU since its count began; else the most of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
