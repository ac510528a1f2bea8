"""One tiny step, measured and thrown away: the policy, the trainer's record and the run folder stay as they are.

The calls have the shapes of the run's own, so that what they take and need is what the run's will; each is made once
to warm up and once to be measured. The first group's pictures are those that the run's first epoch will make.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

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
from rewards.base import Reward, join_scores
from trainers.batch import Batch, Bucket, detached, valid_rows
from trainers.collection import Collection, join_steps_of
from trainers.state import Collected
from trainers.update import Update
from trainers.watch import Watch

if TYPE_CHECKING:
    from trainers.base import Trainer

NEW_PROMPTS = 16  # encoded to see how long one takes
GLANCE = 2  # steps of the evaluation's call that are made: all of them cost the same


class Seen(Reward):
    """The reward itself, which remembers the pictures it is shown, in 8 bits: of videos strips of frames."""

    def __init__(self, reward: Reward) -> None:
        self.reward, self.name, self.differentiable = reward, reward.name, reward.differentiable
        self.card = reward.card
        self.pixels: list[Tensor] = []
        self.first: list[Tensor] = []

    def score(self, media: Media, prompts: Prompts) -> Scores:
        self.pixels.append(to_bytes(stills(media.pixels)))
        self.first = self.first or [to_bytes(media.pixels[0])]
        return self.reward.score(media, prompts)


@dataclass(frozen=True)
class Rollouts:
    """The whole groups that the first micro-batches hold, one group at least.

    advantages: one per sample, 0 for one without a valid score; where a method gives each step its own, their mean.
    pixels: the first group's, of videos strips of frames. medium: the first picture or video, in 8 bits.
    repeatable: whether the same pictures got the same scores the second time.
    Seconds: per row of a network call, per picture decoded, per picture scored.
    """

    batch: Batch
    advantages: Float[Tensor, " b"]
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
    trained step of a micro-batch. flat: all advantages were 0, and it was measured with advantages of 1.
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


def encode_some(trainer: Trainer) -> Encoding:
    """Encode prompts of the first epoch."""
    model, epoch = trainer.model, trainer.collection.epoch(0)
    texts = list(dict.fromkeys(trainer.collection.told(epoch.prompts).text))
    told = model.encode(texts[:1])
    known = [told.prompt_embeds, told.pooled_prompt_embeds]
    size = sum(value[0].nbytes for value in known if value is not None)
    others = texts[1 : 1 + NEW_PROMPTS]
    seconds = timed(model, lambda: model.encode(others)) / len(others) if others else 0.0
    return Encoding(seconds, size)


def timed(model: Model, action: Callable[[], object]) -> float:
    """Seconds that an action takes, the device's work included."""
    model.meter.take()
    started = time.perf_counter()
    action()
    model.meter.take()  # waits for the device
    return time.perf_counter() - started


def roll_out(trainer: Trainer) -> Rollouts:
    """The micro-batches that hold the first group. Raises: ValueError where reward or plan do."""
    model, reward = trainer.model, Seen(trainer.reward)
    collection = Collection(model, reward, trainer.prompts, trainer.sampling, trainer.policy, trainer.seed)
    epoch = collection.epoch(0)
    per_group = trainer.sampling.group_size // epoch.members
    before = collection.collect(epoch, 0)
    reward.pixels.clear()
    model.meter.take()
    parts = [collection.collect(epoch, index) for index in range(-(-per_group // trainer.sampling.batch_size))]
    _, rows, seconds = model.meter.take()
    made = sum(len(part.scores) for part in parts)
    batch = first_groups(trainer, parts)
    advantages = batch.advantages.reshape(len(batch.advantages), -1).mean(1)
    return Rollouts(
        batch,
        advantages,
        torch.cat(reward.pixels)[: trainer.sampling.group_size].float() / 255,
        reward.first[0],
        _same(before.scores, parts[0].scores),
        seconds["rollout"] / rows.forward,
        seconds["decode"] / made,
        seconds["reward"] / made,
    )


def _same(one: Scores, other: Scores) -> bool:
    pairs = [(one.total, other.total), *((value, other.parts[name]) for name, value in one.parts.items())]
    return all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs)


def first_groups(trainer: Trainer, parts: list[Collected]) -> Batch:
    """The epoch's whole groups among these micro-batches as a batch; scores that are not valid are left out."""
    collection, size = trainer.collection, trainer.sampling.group_size
    epoch = collection.epoch(0)
    scores = join_scores([part.scores for part in parts])
    groups = len(scores) // size
    kept, rows = groups * size, groups * size // epoch.members
    names = {name: value[:kept] for name, value in scores.parts.items()}
    scores = Scores(scores.total[:kept], names, scores.valid[:kept])
    group_ids, known = torch.arange(groups).repeat_interleave(size), scores.valid
    advantages = torch.zeros(kept)
    if known.any():
        credited = trainer.credit(valid_rows(scores), group_ids[known])
        advantages = credited.new_zeros(kept, *credited.shape[1:])
        advantages[known] = credited
    steps = tuple(step.rows(torch.arange(kept // step.members)) for step in join_steps_of(parts))
    told = collection.told_rows(epoch, range(rows))
    return Batch(
        epoch.path, torch.arange(rows), told.text, steps, scores, group_ids, advantages, known.float(),
        told.negatives(), (Bucket(epoch.buckets[0].size, range(rows)),), trainer.model.images(told),
    )  # fmt: skip


def learn(trainer: Trainer, batch: Batch) -> Learning:
    """Gradients of the first micro-batch, twice; the second is measured, and both are discarded."""
    flat = not (batch.advantages.reshape(len(batch.weights), -1) * batch.weights[:, None]).any()
    if flat:
        batch = replace(batch, advantages=torch.ones_like(batch.advantages), weights=torch.ones_like(batch.weights))
    rows = batch.rows[: trainer.sampling.batch_size]
    update, optimizer = Update(trainer, batch, None), trainer.optimizer
    for _ in range(2):
        optimizer.discard()
        watch = Watch(trainer.watched(), trainer.ratio_limit(), trainer.model.device)
        seconds = _measured(trainer, update, rows, watch)
    grads = [value.grad for value in optimizer.parameters.values() if value.grad is not None]
    norm = float(torch.stack([grad.double().norm() for grad in grads]).norm()) if grads else 0.0
    scale = optimizer.scaler.get_scale() if optimizer.scaler.is_enabled() else 1.0
    optimizer.discard()
    seen, losses = watch.means(), [loss for _, _, loss in watch.every()]
    return Learning(
        sum(losses) / max(len(losses), 1),
        norm / scale,
        seen.get("ratio_max", math.nan),
        seen.get("clip_fraction", math.nan),
        seconds / max(len(update.trained), 1),
        flat,
    )


def _measured(trainer: Trainer, update: Update, rows: Tensor, watch: Watch) -> float:
    return timed(trainer.model, lambda: update._accumulate(rows, watch))


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
