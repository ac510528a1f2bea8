"""Context parallelism: several processes make each call of a network together, each on a part of its tokens.

For videos and large pictures, whose activations fill a card though the weights fit. diffusers cuts the sequences
(`enable_parallelism`); at attention, where each token sees all others, processes exchange tokens for heads (Ulysses,
arXiv:2309.14509) or pass keys and values round (ring attention, arXiv:2310.01889). Processes that make a call together
have the same samples: work is shared out to groups of them (`flowalign.distributed.split_calls`).

A backward pass leaves each process the gradient of the policy through its own tokens. The sum of these is the
gradient, and their mean a part of it; so the sum over all processes that an optimizer step takes is all there is to do.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flowalign.distributed import exchanging, groups_of, world_size
from flowalign.sharding import plain_class

if TYPE_CHECKING:
    from diffusers.models._modeling_parallel import ParallelConfig

WITHOUT_SUMS = ("native", "_native_npu")  # attention backends that do not tell the logarithms of their softmax's sums


@dataclass(frozen=True)
class ContextParallel:
    """How many processes make each call together, which have consecutive numbers; one process makes it alone.

    Args:
        ulysses: between how many attention's heads are shared out; divides their number, and any backend will do that
            diffusers has made for it, "native" among them.
        ring: between how many keys and values go round; for CUDA and a backend such as "_native_flash". With both,
            ulysses * ring processes make a call.
    """

    ulysses: int = 1
    ring: int = 1

    def __post_init__(self) -> None:
        if min(self.ulysses, self.ring) < 1 or self.size < 2:
            raise ValueError(
                "memory.context_parallel needs ulysses or ring of at least 2 processes, got "
                f"ulysses {self.ulysses} and ring {self.ring}; leave it out for calls of one process"
            )

    @property
    def size(self) -> int:
        """Processes that make a call together."""
        return self.ulysses * self.ring

    def check(self, attention: str, compiled: bool, device: torch.device) -> None:
        """Raises: ValueError for what does not go with it."""
        from diffusers.models.attention_dispatch import AttentionBackendName
        from diffusers.models.attention_dispatch import _AttentionBackendRegistry as Registry

        if compiled:
            raise ValueError("compile does not go with memory.context_parallel, whose calls exchange tokens; drop one")
        if not Registry._is_context_parallel_available(AttentionBackendName(attention)):
            raise ValueError(
                f"memory.attention {attention} cannot exchange tokens for memory.context_parallel; take native or flash"
            )
        if self.ring > 1 and (device.type != "cuda" or attention in WITHOUT_SUMS):
            raise ValueError(
                f"memory.context_parallel.ring is for CUDA and a backend that tells the sums of its softmax, such as "
                f"memory.attention _native_flash; got {attention} on {device}: take ulysses"
            )

    def check_network(self, network: nn.Module) -> None:
        """Raises: ValueError for a network whose sequences diffusers does not cut, or cannot cut so."""
        held: Any = network
        name = plain_class(network).__name__
        if getattr(held, "_cp_plan", None) is None:
            raise ValueError(
                f"diffusers has no plan of how to cut the sequences of a {name} (_cp_plan), as it has for those of "
                "Wan, FLUX and Qwen-Image: leave memory.context_parallel out"
            )
        cut = [str(what) for part in held._cp_plan.values() if isinstance(part, Mapping) for what in part]
        if self.ring > 1 and any(what.endswith("_mask") for what in cut):
            raise ValueError(
                f"a {name} is told by a mask which tokens are padding, and keys that go round bring none with them: "
                "take memory.context_parallel.ulysses"
            )
        heads = held.config.num_attention_heads
        if heads % self.ulysses:
            raise ValueError(
                f"memory.context_parallel.ulysses {self.ulysses} does not divide the {heads} attention heads of this "
                f"{name}"
            )

    def check_lengths(self, lengths: Mapping[str, int]) -> None:
        """Raises: ValueError for sequences that do not come out even.

        Args:
            lengths: in tokens, by what they are of.
        """
        for what, tokens in lengths.items():
            if tokens % self.size:
                raise ValueError(
                    f"{what} are {tokens} tokens, which memory.context_parallel cannot cut into {self.size} equal parts"
                )

    def started(self, device: torch.device) -> ParallelConfig:
        """What diffusers is told: the groups that this process is in. To be called by all processes together.

        Raises: ValueError where groups do not come out even.
        """
        from diffusers import ContextParallelConfig
        from diffusers.models._modeling_parallel import ParallelConfig
        from torch.distributed.device_mesh import init_device_mesh

        shape = groups_of(self.size), self.ring, self.ulysses
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=("data", "ring", "ulysses"))
        made = ContextParallelConfig(ring_degree=self.ring, ulysses_degree=self.ulysses, mesh=mesh)
        told = ParallelConfig(context_parallel_config=made)
        told.setup(dist.get_rank(), world_size(), device, mesh=mesh)
        return told


def cut_calls(network: Any, told: ParallelConfig) -> None:
    """Have a network's calls be made by all processes of a group together, which call it alike."""

    def known(_: Any) -> ParallelConfig:
        network._parallel_config = told
        return told

    network._resolve_parallel_config = known  # diffusers' own looks for accelerators, of which a CPU has none
    for name in ("hooks.context_parallel", "models.attention_dispatch"):  # they call what torch has renamed
        warnings.filterwarnings("ignore", category=FutureWarning, module=rf"diffusers\.{name}")
    for name in ("hooks.context_parallel", "models.modeling_utils"):
        logging.getLogger(f"diffusers.{name}").addFilter(_news)  # each process would say it
    try:
        network.enable_parallelism(config=told)
    finally:
        del network._resolve_parallel_config


def _news(record: logging.LogRecord) -> bool:
    """Whether diffusers says anything but that this is experimental, and that Wan's times, one of a row, stay whole."""
    told = record.getMessage()
    return "is an experimental feature" not in told and "split will not be applied" not in told


def entering(value: Tensor, told: ParallelConfig) -> Tensor:
    """What a network is given, whose gradient is summed over the group: whole on each process, as all outside is."""
    context: Any = told.context_parallel_config
    return _Entering.apply(value, context._flattened_mesh.get_group()) if value.requires_grad else value  # type: ignore[no-any-return,no-untyped-call]


class _Entering(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        total = gradient.clone(memory_format=torch.contiguous_format)
        with exchanging():
            dist.all_reduce(total, group=ctx.group)
        return total, None
