"""What the run will take of a GPU's memory, and which switches make it fit one: predicted, not measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from flowalign.memory_estimate import (
    Activations,
    activations,
    components,
    copied_bytes,
    decode_peak,
    sampling_peak,
    stored_bytes,
    weight_bytes,
)
from flowalign.models.memory import Memory
from flowalign.models.pipeline import PipelineModel
from flowalign.records import Condition
from trainers.preflight.geometry import Geometry
from trainers.preflight.seeing import Loss, seeing

if TYPE_CHECKING:
    from trainers.base import Trainer

CARDS = (24, 40, 80)  # as sold, in 2^30 bytes
ROOM = 0.92  # of a card: CUDA's own context and libraries take half a GB to a GB, and the allocator leaves gaps


@dataclass(frozen=True)
class Switches:
    """The settings that a prediction is made for, and what differs of them from the run's own, as it is written."""

    memory: Memory
    gradient_checkpointing: bool
    precision: torch.dtype
    batch_size: int
    changed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Needs:
    """Bytes on the device.

    weights: of the pipeline, by component; in full fine-tuning those of the network are of the copy that is its
    reference. reward: its weights. policy: the LoRA or network, gradient, average and the optimizer's moments.
    trajectory: an epoch's steps, twice: by micro-batch and joined. What comes one after the other: `learning`
    (activations of a micro-batch), `sampling` (of the largest call without gradient), `decoding`, and `encoding`, the
    weights of text encoders that are on the device for that alone.
    """

    weights: dict[str, int]
    reward: int
    policy: int
    trajectory: int
    learning: int
    sampling: int
    decoding: int
    encoding: int

    @property
    def total(self) -> int:
        """The most at once."""
        passing = max(self.learning, self.sampling, self.decoding, self.encoding)
        return sum(self.weights.values()) + self.reward + self.policy + self.trajectory + passing

    def fits(self, card: int) -> bool:
        """Whether a card of so many 2^30 bytes is enough."""
        return self.total <= ROOM * card * 2**30


@dataclass(frozen=True)
class Fit:
    """What makes a run fit a card: the switches that were turned, one on top of another, and what is needed with each.

    Empty where it fits as it is. enough: whether it fits after the last of them.
    """

    card: int
    turned: tuple[tuple[str, Needs], ...]
    enough: bool


@dataclass(frozen=True)
class Prediction:
    """Of the run as it is, and of each card. with_reward: whether the reward's activations are counted, if any are."""

    needs: Needs
    fits: tuple[Fit, ...]
    with_reward: bool = True


def predict(trainer: Trainer, cut: Geometry) -> Prediction | None:
    """For the largest media of the run; None for a model that is no diffusers pipeline.

    Raises: RuntimeError where the network cannot be run without numbers.
    """
    model = trainer.model
    if not isinstance(model, PipelineModel):
        return None
    with model.sized(trainer.collection.order[0]):
        now = present(trainer, model)
        passing = Passing(trainer, model, _most_rows(trainer, cut), cut.callers)
        own = needs(trainer, model, cut, now, passing)
        least = own
        path, said = list[tuple[str, Needs]](), 0
        for choice in () if own.fits(CARDS[0]) else switches(now, model.policy.whole):
            made = needs(trainer, model, cut, choice, passing)
            if made.total < least.total:  # what did not help yet is told with what did on top of it
                path.append((" and ".join(choice.changed[said:]), made))
                least, said = made, len(choice.changed)
            if least.fits(CARDS[0]):
                break
    return Prediction(own, tuple(_fit(own, path, card) for card in CARDS), passing.with_reward)


def _fit(own: Needs, path: list[tuple[str, Needs]], card: int) -> Fit:
    turned: list[tuple[str, Needs]] = []
    last = own
    for name, made in path:
        if last.fits(card):
            break
        turned.append((name, made))
        last = made
    return Fit(card, tuple(turned), last.fits(card))


def present(trainer: Trainer, model: PipelineModel) -> Switches:
    """The run's own."""
    network: Any = model.module
    return Switches(model.memory, network.is_gradient_checkpointing, model.dtype, trainer.sampling.batch_size)


def switches(now: Switches, whole: bool = False) -> Iterator[Switches]:
    """One more switch turned each time, those first that cost least; `whole`: all weights are trained, none packed."""

    def turned(told: str, more: Switches) -> Switches:
        return replace(more, changed=(*now.changed, told))

    if now.precision == torch.float32:
        yield (now := turned("model.mixed_precision: bf16", replace(now, precision=torch.bfloat16)))
    held = now.memory
    for name, off, more in (
        ("vae_slicing: true", not held.vae_slicing, replace(held, vae_slicing=True)),
        ("offload: encoders", held.offload == "no", replace(held, vae_slicing=True, offload="encoders")),
        ("trajectory_on_cpu: true", not held.trajectory_on_cpu, _light(held)),
    ):
        if off:
            yield (now := turned(f"model.memory.{name}", replace(now, memory=more)))
    if not now.gradient_checkpointing:
        yield (now := turned("model.gradient_checkpointing: true", replace(now, gradient_checkpointing=True)))
    while now.batch_size > 1:
        size = now.batch_size // 2
        yield (now := turned(f"sampling.batch_size: {size}, rows_per_call likewise", replace(now, batch_size=size)))
    plain = held.quantize == "no" and held.shard is None and not held.layerwise_casting and held.offload != "group"
    if plain and not whole:
        for told, kind in (("int8", "int8"), ("nf4 instead", "nf4")):
            packed = replace(now.memory, quantize=kind)  # type: ignore[arg-type]
            yield (now := turned(f"model.memory.quantize: {told}", replace(now, memory=packed)))


class Passing:
    """What is held for the time of a call, each run on fakes made once; of `callers` each holds its own tokens'."""

    def __init__(self, trainer: Trainer, model: PipelineModel, most_rows: int, callers: int = 1) -> None:
        self.model, self.rows, self.callers = model, most_rows, callers
        self.policy, settings = trainer.policy, trainer.sampling
        self.whole, self.per_call = settings.batch_size, settings.rows_per_call
        self._prompts, self._reward = trainer.collection.told_rows(trainer.collection.epoch(0), [0]), trainer.reward
        self._told = model.condition(self._prompts)
        self.with_reward = True  # unless it could not be run on fakes
        self.activations = lru_cache(self._activations)
        self.sampling = lru_cache(self._sampling)
        self.decoding = lru_cache(partial(decode_peak, model))
        self.seeing = lru_cache(self._seeing)

    def called(self, batch_size: int) -> int:
        """Rows of the largest call without gradient."""
        return max(min(self.per_call, self.rows) * batch_size // self.whole, 1)

    def _activations(self, rows: int, checkpointing: bool, precision: torch.dtype) -> Activations:
        """Of one guided velocity with gradient."""
        scale = self.policy.guidance_scale
        both = 2 if self.policy.unconditional_grad and self.model.calls(scale, 0.5) == 2 else 1
        one = activations(self.model, self._repeated(rows), checkpointing, precision, scale)
        return Activations(both * one.saved // self.callers, both * one.peak // self.callers)

    def _seeing(self, rows: int, loss: Loss) -> int:
        """Bytes of decoding so many latents and scoring the pictures, with gradient; see `seeing`."""
        found = seeing(self.model, self._reward, self._prompts, rows, loss)
        self.with_reward = self.with_reward and found.with_reward
        return found.peak

    def _sampling(self, rows: int, precision: torch.dtype) -> int:
        return sampling_peak(self.model, self._repeated(rows), precision, self.policy.guidance_scale) // self.callers

    def _repeated(self, rows: int) -> Condition:
        return self._told.rows(torch.zeros(rows, dtype=torch.int64))


def _light(memory: Memory) -> Memory:
    """With all that costs little speed."""
    offload = "encoders" if memory.offload == "no" else memory.offload
    return replace(memory, vae_slicing=True, trajectory_on_cpu=True, offload=offload)


def needs(trainer: Trainer, model: PipelineModel, cut: Geometry, choice: Switches, passing: Passing) -> Needs:
    """What the run needs with these settings."""
    held = {name: resident(name, part, model, choice) for name, part in components(model).items()}
    memory, most = choice.memory, passing.called(choice.batch_size)
    split = 1 if memory.shard is None else memory.shard.parts(cut.processes)
    for name in (model.network_name, *model.beside):
        held[name] //= split
    waiting = {name: size for name, size in held.items() if name.startswith("text_encoder")}
    away = memory.offload != "no"
    gathers = memory.copies_weights or split > 1
    copied = copied_bytes(model.module, torch.float32 if model.policy.whole else choice.precision) if gathers else 0
    return Needs(
        {name: size for name, size in held.items() if not (away and name in waiting)},
        reward_bytes(trainer),
        policy_bytes(trainer) // (split if model.policy.whole else 1),
        0 if memory.trajectory_on_cpu else 2 * trajectory_bytes(trainer, cut),
        trainer.preflight().learning_bytes(choice, passing) + copied,
        passing.sampling(most, choice.precision),
        passing.decoding(1 if memory.vae_slicing else most),
        sum(waiting.values()) if away else 0,
    )


def _most_rows(trainer: Trainer, cut: Geometry) -> int:
    """Of a call without gradient: a micro-batch with all its members, or the evaluation's."""
    prompts = trainer.evaluator.prompts
    return max(cut.batch_size * cut.members, len(prompts) if prompts is not None else 0)


def resident(name: str, part: nn.Module, model: PipelineModel, choice: Switches) -> int:
    """Bytes of a component's frozen weights on the device."""
    if name == model.network_name and model.policy.whole:  # what is trained is counted as the policy
        return 0 if model.kept is None else stored_bytes(model.kept.parameters())
    network, encoder = name in (model.network_name, *model.beside), name.startswith("text_encoder")
    if not network and not encoder:
        return stored_bytes([*part.parameters(), *part.buffers()])
    read = None if choice.precision == model.dtype and encoder else choice.precision
    memory = replace(choice.memory, layerwise_casting=False, quantize="no") if encoder else choice.memory
    sizes = weight_bytes(part, memory, read, encoder)
    away = 0
    if network and choice.memory.offload == "group":
        away = sum(
            one.in_features * one.out_features * choice.precision.itemsize
            for layer, one in part.named_modules()
            if isinstance(one, nn.Linear) and ".lora_" not in layer
        )
    return sum(sizes.values()) - away


def policy_bytes(trainer: Trainer) -> int:
    """The policy in float32 with its gradient, the optimizer's two moments and counts, and the average."""
    values, settings = trainer.model.trainable().values(), trainer.optimizer.settings
    numbers = sum(value.numel() for value in values)
    each = 4 + 4 + 2 * (1 if settings.eight_bit else 4) + (4 if settings.ema_decay else 0)
    return numbers * each + 4 * len(values)


def trajectory_bytes(trainer: Trainer, cut: Geometry) -> int:
    """What one process holds of an epoch's rollouts until it is over."""
    return trainer.preflight().kept_bytes(cut)


def reward_bytes(trainer: Trainer) -> int:
    """Weights of the networks in the reward that are on the model's device."""
    device = trainer.model.device.type
    rewards = (trainer.reward, trainer.evaluator.reward)
    networks = list({id(one): one for reward in rewards for one in _networks(reward, set())}.values())
    values = [value for one in networks for value in (*one.parameters(), *one.buffers())]
    return stored_bytes([value for value in values if value.device.type == device])


def _networks(thing: Any, seen: set[int]) -> Iterator[nn.Module]:
    """The networks that an object holds, however deep in objects of ours, lists and mappings."""
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, nn.Module):
        yield thing
        return
    held: list[Any] = []
    if isinstance(thing, list | tuple):
        held = [*thing]
    elif isinstance(thing, dict):
        held = [*thing.values()]
    elif type(thing).__module__.startswith("rewards."):
        held = [*vars(thing).values()]
    for one in held:
        yield from _networks(one, seen)
