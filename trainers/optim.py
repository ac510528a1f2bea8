"""The policy's optimizer: AdamW with warm-up, gradient clipping, loss scaling under fp16, and an average of weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flowalign.distributed import counted_once, sum_over_ranks
from flowalign.shards import Stored, clip_shards, cloned, in_shards, is_sharded, like, own_rows
from trainers.state import State


@dataclass(frozen=True)
class Optimizer:
    """Flow-GRPO's settings (arXiv:2505.05470) are the defaults.

    warmup: optimizer steps over which the learning rate rises linearly from 0.
    decay: optimizer steps after the warm-up over which it falls linearly to 0; 0 for never.
    max_grad_norm: the global norm that gradients are clipped to.
    max_skipped: steps in a row that may be left out for a loss or gradient that is not finite; one more stops the run.
    ema_decay, ema_every: every `ema_every` optimizer steps the averaged weights move by 1 - min((1 + n) / (10 + n),
        ema_decay) towards the policy's, n the number of optimizer steps so far; evaluation and saving take the average.
        0 for no average.
    eight_bit: bitsandbytes' AdamW8bit (CUDA; the extra [eightbit]).
    """

    learning_rate: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 1e-4
    eps: float = 1e-8
    warmup: int = 0
    decay: int = 0
    max_grad_norm: float = 1.0
    max_skipped: int = 3
    ema_decay: float = 0.9
    ema_every: int = 8
    eight_bit: bool = False

    def __post_init__(self) -> None:
        if self.learning_rate <= 0 or self.max_grad_norm <= 0:
            raise ValueError("optimizer.learning_rate and optimizer.max_grad_norm must be positive")
        if min(self.warmup, self.decay, self.max_skipped) < 0:
            raise ValueError("optimizer.warmup, optimizer.decay and optimizer.max_skipped must be at least 0")
        if not 0 <= self.ema_decay < 1 or self.ema_every < 1:
            raise ValueError(
                f"optimizer.ema_decay must lie in [0, 1), got {self.ema_decay}, and ema_every be at least 1"
            )


class PolicyOptimizer:
    """An optimizer over the policy's parameters, which keeps their average beside them."""

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        settings: Optimizer,
        fp16: bool = False,
        go_back: Callable[[Tensor], None] = Tensor.backward,
    ) -> None:
        self.parameters, self.settings, self.steps = parameters, settings, 0
        self._go_back, values = go_back, list(parameters.values())
        if not values:
            raise ValueError("the model has no trainable parameters")
        self._device = values[0].device
        # of a network in shards its own rows are what a process steps: AdamW looks at each number alone
        self._own = {name: nn.Parameter(own_rows(p)) if is_sharded(p) else p for name, p in parameters.items()}
        self.adamw = _adamw([*self._own.values()], settings)
        self.average = self.snapshot() if settings.ema_decay else {}
        self.scaler = torch.amp.GradScaler(self._device.type, enabled=fp16)

    @property
    def learning_rate(self) -> float:
        """Of the next step."""
        settings, rate = self.settings, self.settings.learning_rate
        if self.steps < settings.warmup:
            return rate * (self.steps + 1) / settings.warmup
        left = 1 - (self.steps - settings.warmup) / settings.decay if settings.decay else 1.0
        return rate * max(left, 0.0)

    def backward(self, loss: Tensor) -> None:
        """Add the loss's gradient to what is there."""
        self._go_back(self.scaler.scale(loss))

    def discard(self) -> None:
        """Forget the gradients so far."""
        self.adamw.zero_grad(set_to_none=True)
        for value in self.parameters.values():
            value.grad = None

    def step(self, sums: Sequence[Tensor] = ()) -> float:
        """Sum gradients over processes, clip, step, average; returns the gradient's norm before clipping.

        A norm that is not finite is the same on every process, and means that the step was left out.

        Args:
            sums: tensors to be summed over processes in the same exchange, as by `sum_over_data`.
        """
        sums = counted_once(sums)
        values = list(self.parameters.values())
        for value in values:  # a micro-batch with nothing to learn made none, on this process or at all
            value.grad = torch.zeros_like(value) if value.grad is None else value.grad
        if is_sharded(values[0]):
            norm = self._clip_own(sums)
        else:
            sum_over_ranks([*(value.grad for value in values if value.grad is not None), *sums])
            self.scaler.unscale_(self.adamw)
            norm = float(nn.utils.clip_grad_norm_(values, self.settings.max_grad_norm))
        for group in self.adamw.param_groups:
            group["lr"] = self.learning_rate
        if math.isfinite(norm):
            self.scaler.step(self.adamw)
            self._count()
        self.scaler.update()
        self.discard()
        return norm

    def _clip_own(self, sums: Sequence[Tensor]) -> float:
        """Take over this process's rows of gradients in shards, which are sums over processes already."""
        values = list(self.parameters.values())
        for value, own in zip(values, self._own.values(), strict=True):
            assert value.grad is not None
            assert own.data_ptr() == own_rows(value).data_ptr(), "the shards have moved in memory"
            own.grad = own_rows(value.grad)
        gradients = [own.grad for own in self._own.values() if own.grad is not None]
        return clip_shards(gradients, values[0], sums, self.settings.max_grad_norm)

    def _count(self) -> None:
        self.steps += 1
        if self.average and self.steps % self.settings.ema_every == 0:
            decay = min((1 + self.steps) / (10 + self.steps), self.settings.ema_decay)
            for name, value in self.parameters.items():
                own_rows(self.average[name]).lerp_(own_rows(value), 1 - decay)

    def scaling_down(self) -> bool:
        """Whether a gradient that is not finite is the loss scale's own doing: fp16, and it can still be lowered."""
        return self.scaler.is_enabled() and self.scaler.get_scale() > 1

    def capture(self, state: State) -> None:
        """Put all that the optimizer is into the record."""
        state.policy = {name: value.detach() for name, value in self.parameters.items()}
        state.average, state.steps, state.scaler = self.average, self.steps, self.scaler.state_dict()
        held = self.adamw.state
        state.moments = {name: self._shared(name, held[own]) for name, own in self._own.items() if own in held}

    def restore(self, state: State) -> None:
        """Become what the record says.

        Raises: ValueError where it has other parameters.
        """
        for name, value in self.parameters.items():
            if name not in state.policy or state.policy[name].shape != value.shape:
                raise ValueError(f"the checkpoint's policy has no {name} of shape {list(value.shape)}")
        self._set(state.policy)
        if self.average and state.average:  # an average that has been turned on starts here
            self.average = {name: value.to(self._device) for name, value in state.average.items()}
        elif self.average:
            self.average = self.snapshot()
        self.steps = state.steps
        self.scaler.load_state_dict(state.scaler)
        numbers = {name: i for i, name in enumerate(self.parameters)}
        moments = {numbers[name]: self._rows(name, held) for name, held in state.moments.items()}
        self.adamw.load_state_dict({"state": moments, "param_groups": self.adamw.state_dict()["param_groups"]})

    def placed(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """A checkpoint's record, in which what it holds of each parameter is in shards where that is, and else whole.

        Raises: ValueError for what was in shards and is of no parameter here.
        """
        held = dict(record)
        for kind in ("policy", "average", "older"):
            held[kind] = {name: self._here(name, value) for name, value in held.get(kind, {}).items()}
        moments = held.get("moments", {}).items()
        held["moments"] = {name: {key: self._here(name, one) for key, one in of.items()} for name, of in moments}
        return held

    def _here(self, name: str, value: Tensor | Stored) -> Tensor:
        parameter = self.parameters.get(name)
        if parameter is not None and tuple(value.shape) == tuple(parameter.shape):
            return like(value, parameter)
        if isinstance(value, Stored):
            raise ValueError(f"the checkpoint holds {name} of shape {[*value.shape]}, which the policy here has not")
        return value

    def _shared(self, name: str, held: dict[str, Any]) -> dict[str, Any]:
        """AdamW's record of a parameter, in shards where that is."""
        value, own = self.parameters[name], self._own[name]
        if not is_sharded(value):
            return dict(held)
        return {key: in_shards(one, value) if one.shape == own.shape else one for key, one in held.items()}

    def _rows(self, name: str, held: dict[str, Any]) -> dict[str, Any]:
        """The way back."""
        return {key: own_rows(one) for key, one in held.items()} if is_sharded(self.parameters[name]) else held

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """While entered, the policy's weights are their average."""
        if not self.average:
            yield
            return
        with self.holding(self.average):
            yield

    def snapshot(self) -> dict[str, Tensor]:
        """The policy's weights as they are now."""
        return {name: cloned(value) for name, value in self.parameters.items()}

    @contextmanager
    def holding(self, values: dict[str, Tensor]) -> Iterator[None]:
        """While entered, the policy's weights are these. What has been computed with gradient before is void then."""
        kept = self.snapshot()
        self._set(values)
        try:
            yield
        finally:
            self._set(kept)

    @torch.no_grad()
    def _set(self, values: dict[str, Tensor]) -> None:
        for name, value in self.parameters.items():
            own_rows(value).copy_(own_rows(values[name]))


def _adamw(values: list[nn.Parameter], settings: Optimizer) -> Any:
    return (_eight_bit() if settings.eight_bit else torch.optim.AdamW)(
        values,
        lr=settings.learning_rate,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
        eps=settings.eps,
    )


def _eight_bit() -> Any:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ValueError("optimizer.eight_bit needs the extra: pip install 'flowalign-diffusion[eightbit]'") from error
    return AdamW8bit
