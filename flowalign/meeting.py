"""Processes that hold a network in shards, and do not call it equally often.

Whoever calls such a network needs the shards of all. A process that has no call to make, because its share of the work
is smaller or because it has nothing to learn from, joins in those of the others until it has one:

    wanted  what each process is about to do: a call of a network, a backward pass, or nothing, waiting at an exchange
    all do the first of what is wanted, in one fixed order; whoever wanted something else has joined in, and asks again

To join in is to call the network as it was last called, or to go back from zeros through such a call, which adds zeros
to the gradients. So each process makes the same calls and backward passes in the same order as all others, whatever
their work is, and nothing else has to know of it: neither rollouts nor updates, evaluations or rewards.
"""

from __future__ import annotations

import inspect
import json
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from flowalign.checkpoint import pack, unpack
from flowalign.distributed import WAITED_FOR, answering, exchanging

# wanted beside calls, which are 2 n of the n-th network and 2 n + 1 of the same with gradient; the least comes first
BACKWARD = 1 << 20  # to the parameters
SLOPE = BACKWARD + 1  # to what a call was given
NOTHING = BACKWARD + 2

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Specimen:
    """What a network was called with, without gradient, and in which precision."""

    arguments: Sequence[Any]
    named: Mapping[str, Any]
    device: str
    autocast: str | None

    @classmethod
    def of(cls, arguments: Sequence[Any], named: Mapping[str, Any], device: torch.device) -> Specimen:
        """That of a call that is about to be made."""
        given, others = tree_map_only(Tensor, Tensor.detach, (tuple(arguments), dict(named)))
        cast = torch.is_autocast_enabled(device.type)
        dtype = str(torch.get_autocast_dtype(device.type)).removeprefix("torch.") if cast else None
        return cls(given, others, device.type, dtype)

    def call(self, network: nn.Module, arguments: Sequence[Any], named: Mapping[str, Any]) -> Any:
        """The network's answer to these, in the same precision."""
        dtype = None if self.autocast is None else getattr(torch, self.autocast)
        with torch.autocast(self.device, dtype, enabled=dtype is not None):
            return network(*arguments, **named)


class Meeting:
    """All processes, and the sharded networks of this one, which are added in the same order on each."""

    def __init__(self) -> None:
        self._networks: list[weakref.ref[nn.Module]] = []
        self._specimens: dict[int, Specimen] = {}
        self._outputs: list[Tensor] = []  # of calls with gradient since the last backward pass
        self._leaves: list[Tensor] = []  # what those were given
        self._joining = False

    def add(self, network: nn.Module, device: torch.device, fresh: Callable[[], None] | None = None) -> None:
        """Have each call of a network met. To be called once it is sharded.

        A call is made of the shards that processes have as they come to it, whether of their own or to join in: weights
        may be changed where no process calls the network before all have changed theirs, as after an exchange.

        Args:
            fresh: called before each call, also one that is joined in, to bring this process's shards up to date.
        """
        number, first = len(self._networks), next(iter(inspect.signature(network.forward).parameters))
        self._networks.append(weakref.ref(network))

        def before(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> Arguments:
            learnt = torch.is_grad_enabled()
            if fresh is not None:
                fresh()
            if not self._joining:
                self._specimens[number] = Specimen.of(arguments, named, device)
                self._meet(2 * number + learnt)
            return self._learning(first, arguments, named) if learnt else (arguments, named)

        def after(_: nn.Module, arguments: Any, output: Any) -> None:
            if torch.is_grad_enabled():
                self._outputs += [one for one in _tensors(output) if one.requires_grad][:1]

        network.register_forward_pre_hook(before, prepend=True, with_kwargs=True)
        network.register_forward_hook(after)

    def _learning(self, first: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> Arguments:
        """The same arguments, the first of which has a gradient: so every call's backward pass is the same."""

        def leaf(value: Tensor) -> Tensor:
            if not value.is_floating_point():
                return value
            made = value if value.requires_grad else value.detach().requires_grad_()
            self._leaves.append(made)
            return made

        if first in named:
            return arguments, {**named, first: tree_map_only(Tensor, leaf, named[first])}
        return (tree_map_only(Tensor, leaf, arguments[0]), *arguments[1:]), named

    def backward(self, loss: Tensor) -> None:
        """Add a loss's gradient to that of the parameters."""
        self._meet(BACKWARD)
        self._go_back(loss)

    def slope(self, total: Tensor, at: Tensor) -> Tensor:
        """The gradient of a number at something that a network was given."""
        self._meet(SLOPE)
        return self._slopes([total], [at])[0]

    def wait(self) -> None:
        """Join in with others until all wait. A barrier."""
        self._meet(NOTHING)

    def _meet(self, wanted: int) -> None:
        """Join in with what others want, until it is the turn of what is wanted here."""
        while True:
            held = sum(1 << number for number in self._specimens)
            table = _told([wanted, held])
            chosen = min(row[0] for row in table)
            if chosen < BACKWARD:
                lacking = any(row[0] != chosen and not row[1] >> chosen // 2 & 1 for row in table)
                if lacking:
                    source = [row[0] for row in table].index(chosen)
                    self._specimens[chosen // 2] = _handed_on(self._specimens.get(chosen // 2), source)
            if chosen == wanted:
                return
            assert {wanted, chosen} != {BACKWARD, SLOPE}, "two kinds of backward pass at once"
            self._join(chosen)

    def _join(self, chosen: int) -> None:
        if chosen == BACKWARD:
            return self._go_back(None)
        if chosen == SLOPE:
            self._slopes([], [])
            return None
        network, specimen = self._networks[chosen // 2](), self._specimens[chosen // 2]
        assert network is not None, "a network that others call is gone here"
        with self._as_joining(), torch.set_grad_enabled(bool(chosen % 2)), exchanging():
            specimen.call(network, specimen.arguments, specimen.named)
        return None

    @contextmanager
    def _as_joining(self) -> Iterator[None]:
        self._joining = True
        try:
            yield
        finally:
            self._joining = False

    def _go_back(self, loss: Tensor | None) -> None:
        """From a loss, and from zeros at every call since the last time."""
        ends: list[Tensor] = [*self._outputs]
        starts: list[Tensor | None] = [torch.zeros_like(one) for one in ends]
        if loss is not None:
            ends, starts = [loss, *ends], [None, *starts]
        self._forget()
        if ends:
            with exchanging():
                torch.autograd.backward(ends, starts)

    def _slopes(self, totals: list[Tensor], at: list[Tensor]) -> Sequence[Tensor]:
        known = {id(one) for one in at}
        ends, places = [*totals, *self._outputs], [*at, *(one for one in self._leaves if id(one) not in known)]
        starts = [torch.ones_like(one) for one in totals] + [torch.zeros_like(one) for one in self._outputs]
        self._forget()
        if not ends:
            return ()
        with exchanging():
            return torch.autograd.grad(ends, places, starts, allow_unused=True)

    def _forget(self) -> None:
        self._outputs, self._leaves = [], []


def _tensors(output: Any) -> list[Tensor]:
    found: list[Tensor] = []
    tree_map_only(Tensor, found.append, output if isinstance(output, Tensor | tuple | list) else tuple(output.values()))
    return found


def _told(numbers: Sequence[int]) -> list[list[int]]:
    """Every process's numbers."""
    rows = [torch.zeros(len(numbers), dtype=torch.int64) for _ in range(dist.get_world_size())]
    with answering():
        dist.all_gather(rows, torch.tensor([*numbers]))
    return [row.tolist() for row in rows]


def _handed_on(specimen: Specimen | None, source: int) -> Specimen:
    """A process's specimen, on every one."""
    mine = dist.get_rank() == source
    data, tensors = pack(specimen) if mine else (None, {})
    kinds = {name: [str(one.dtype).removeprefix("torch."), [*one.shape]] for name, one in tensors.items()}
    data, kinds = json.loads(_text_of(json.dumps([data, kinds]) if mine else "", source))
    with answering():
        for name, (dtype, shape) in kinds.items():
            value = tensors[name] if mine else torch.empty(shape, dtype=getattr(torch, dtype))
            dist.broadcast(value, source)
            tensors[name] = value
    if specimen is not None:
        return specimen
    held = unpack(data, tensors)
    moved = tree_map_only(Tensor, lambda one: one.to(_place(held["device"])), (held["arguments"], held["named"]))
    return Specimen(tuple(moved[0]), moved[1], held["device"], held["autocast"])


def _place(kind: str) -> torch.device:
    return torch.device("cpu") if kind == "cpu" else torch.device(kind, torch.accelerator.current_device_index())


def _text_of(text: str, source: int) -> str:
    length = torch.tensor([len(text.encode())])
    with answering():
        dist.broadcast(length, source)
        raw = torch.zeros(int(length), dtype=torch.uint8)
        if text:
            raw = torch.tensor([*text.encode()], dtype=torch.uint8)
        dist.broadcast(raw, source)
    return bytes(raw.tolist()).decode()


def meeting() -> Meeting:
    """That of this process."""
    found = [one for one in WAITED_FOR if isinstance(one, Meeting)]
    if not found:
        found.append(Meeting())
        WAITED_FOR.append(found[0])
    return found[0]
