"""What of a network is trained: a LoRA beside frozen weights, or all of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers.models._modeling_parallel import ParallelConfig
from torch import Tensor, nn

from flowalign.adapters import LoRA, add_policy, as_now, as_reference, policy_parameters, recomputed, save_policy
from flowalign.context_parallel import cut_calls, entering
from flowalign.distributed import world_size
from flowalign.models.base import Older
from flowalign.models.editing import EditingModel
from flowalign.models.memory import Memory, finish
from flowalign.sharding import Shard
from flowalign.shards import is_sharded
from flowalign.whole import Full, frozen_copy, train_all, weights_of, write_network


class NetworkPolicy(ABC):
    """The policy on a pipeline's network, as `flowalign.models.Model` speaks of it.

    folder: what its weights are written to, in a run's folder. whole: whether all of the network's weights are it.
    """

    folder: str
    whole: ClassVar[bool] = False

    def __init__(self, pipeline: Any, name: str) -> None:
        self.pipeline, self.name = pipeline, name
        self.network: nn.Module = getattr(pipeline, name)

    @abstractmethod
    def trainable(self) -> dict[str, nn.Parameter]:
        """See `Model.trainable`."""

    @abstractmethod
    def reference(self, model: PolicyModel) -> AbstractContextManager[None]:
        """See `Model.reference`."""

    @abstractmethod
    def as_now(self, model: PolicyModel) -> AbstractContextManager[None]:
        """See `Model.as_now`."""

    def frozen_copy(self, settings: Shard | None, device: torch.device, values: Older | None = None) -> Any:
        """A network of its own, sharded by the settings, that stays what this one is or becomes what `values` give;
        None where there is no need of one."""
        return None

    @abstractmethod
    def unsharded(self) -> list[nn.Parameter]:
        """The network's parameters that stay whole on each process where the network is in shards."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """See `Model.save`."""

    def export(self) -> Callable[[Path], None]:
        """See `Model.export`."""
        return self.save


class LowRank(NetworkPolicy):
    """A LoRA beside frozen weights."""

    folder = "lora"

    def __init__(self, pipeline: Any, name: str, lora: LoRA, targets: tuple[str, ...]) -> None:
        super().__init__(pipeline, name)
        self.lora = lora
        add_policy(pipeline, self.network, lora, targets)

    def trainable(self) -> dict[str, nn.Parameter]:
        return policy_parameters(self.network)

    def reference(self, model: PolicyModel) -> AbstractContextManager[None]:
        return as_reference(self.network, self.lora.reference if self.lora.start else "base")

    def as_now(self, model: PolicyModel) -> AbstractContextManager[None]:
        return as_now(self.network)

    def unsharded(self) -> list[nn.Parameter]:
        """Those of all adapters."""
        return [value for name, value in self.network.named_parameters() if ".lora_" in name]

    def save(self, folder: Path) -> None:
        save_policy(self.pipeline, self.network, folder, self.name)


class Whole(NetworkPolicy):
    """All of the network's weights. The reference is another network, which is called in the place of this one."""

    whole = True

    def __init__(self, pipeline: Any, name: str, full: Full) -> None:
        super().__init__(pipeline, name)
        self.folder = name  # as a pipeline's own folder has it
        train_all(self.network, full)

    def trainable(self) -> dict[str, nn.Parameter]:
        return dict(self.network.named_parameters())

    def reference(self, model: PolicyModel) -> AbstractContextManager[None]:
        assert model.kept is not None, "the start of full fine-tuning was not kept: call keep() before training"
        return calling(model, model.kept)

    def as_now(self, model: PolicyModel) -> AbstractContextManager[None]:
        return calling(model, model.call)

    def frozen_copy(self, settings: Shard | None, device: torch.device, values: Older | None = None) -> Any:
        return frozen_copy(self.network, settings, device, values)

    def unsharded(self) -> list[nn.Parameter]:
        """None."""
        return []

    def save(self, folder: Path) -> None:
        self.export()(folder)

    def export(self) -> Callable[[Path], None]:
        network = self.network
        if any(is_sharded(value) for value in network.parameters()):
            return partial(write_network, network, weights_of(network))
        return lambda folder: write_network(network, weights_of(network), folder)


def policy_on(pipeline: Any, name: str, lora: LoRA | Full | None, targets: tuple[str, ...]) -> NetworkPolicy:
    """That of a pipeline's network.

    Args:
        lora: its settings; None is `Full()`. targets: the modules that a LoRA adapts by default.
    """
    return LowRank(pipeline, name, lora, targets) if isinstance(lora, LoRA) else Whole(pipeline, name, lora or Full())


@contextmanager
def calling(model: PolicyModel, network: Any) -> Iterator[None]:
    """While entered, this network is the one that the model calls."""
    held, model.call = model.call, network
    try:
        yield
    finally:
        model.call = held


def check_whole(memory: Memory, fp16: bool) -> None:
    """Raises: ValueError for what does not go with training all of a network's weights."""
    others = {
        f"memory.quantize: {memory.quantize}": memory.quantize != "no",
        "memory.layerwise_casting": memory.layerwise_casting,
        "memory.offload: group": memory.offload == "group",
        "mixed_precision: fp16 with memory.shard (take bf16)": fp16 and memory.shard is not None,
    }
    for name, on in others.items():
        if on:
            raise ValueError(f"lora: null trains all of the network's weights, which does not go with {name}")


class PolicyModel(EditingModel):
    """A model whose policy is on one of a pipeline's networks.

    call: the network as it is called. kept, older: those of the reference and of an older policy, where they are
    networks of their own.
    """

    pipeline: Any
    policy: NetworkPolicy
    memory: Memory
    dtype: torch.dtype
    compiled: bool
    call: Any
    kept: Any = None
    older: Any = None
    cut: ParallelConfig | None = None  # how processes make each call together, where they do

    def cut_calls(self, networks: Sequence[str]) -> None:
        """Have processes make each call of these networks of the pipeline together, as `memory.context_parallel` asks.

        Raises: ValueError for networks, heads and numbers of processes that it cannot be had with.
        """
        asked = self.memory.context_parallel
        if asked is None:
            return
        parts = [getattr(self.pipeline, name) for name in networks]
        for part in parts:
            asked.check_network(part)
        if world_size() == 1:
            return
        self.cut, self.callers = asked.started(self.device), asked.size
        for part in parts:
            cut_calls(part, self.cut)

    def check_tokens(self) -> None:
        if self.memory.context_parallel is not None:
            self.memory.context_parallel.check_lengths(self.sequences())

    def sequences(self) -> Mapping[str, int]:
        """How many tokens a call has of what, for media of the present size."""
        return {}

    def entering(self, latents: Tensor) -> Tensor:
        """Latents on their way into the network; see `flowalign.context_parallel.entering`."""
        return latents if self.cut is None else entering(latents, self.cut)

    def keep(self, start: bool, older: bool, values: Older) -> None:
        self.kept = self._apart(None) if start else None
        self.older = self._apart(values) if older and self.sharded else None

    def as_older(self) -> AbstractContextManager[None] | None:
        return None if self.older is None else calling(self, self.older)

    def _apart(self, values: Older | None) -> Any:
        made = self.policy.frozen_copy(self.memory.shard if self.sharded else None, self.device, values)
        if made is None:
            return None
        finish(made, self.memory, self.dtype, self.device)
        if self.cut is not None:
            cut_calls(made, self.cut)
        network: Any = self.policy.network
        if network.is_gradient_checkpointing:
            made.enable_gradient_checkpointing(recomputed)
        return torch.compile(made) if self.compiled else made

    def trainable(self) -> dict[str, nn.Parameter]:
        return self.policy.trainable()

    def reference(self) -> AbstractContextManager[None]:
        return self.policy.reference(self)

    def as_now(self) -> AbstractContextManager[None]:
        return self.policy.as_now(self)

    def save(self, folder: Path) -> None:
        self.policy.save(folder)

    def export(self) -> Callable[[Path], None]:
        return self.policy.export()
