"""Networks in shards: each process holds a part of the weights, and gathers a block's when it is called (FSDP2).

ZeRO-3 (arXiv:1910.02054) as torch's `fully_shard` does it, over all processes; with `group`, over groups of so many
that each hold all weights between them (HSDP), so that weights are gathered within a machine. A LoRA is left out: it
stays whole on every process, and with it its optimizer, average, checkpoints and export. Weights are gathered as they
are stored, so that a call's numbers are those of a network that is whole, to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from flowalign.distributed import world_size

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class Shard:
    """A network in shards, one on each process; on one process it stays whole.

    Args:
        group: processes that hold all weights between them, such as those of one machine; None for all processes.
        encoders: the text encoders too.
    """

    group: int | None = None
    encoders: bool = False

    def __post_init__(self) -> None:
        if self.group is not None and self.group < 2:
            raise ValueError(f"memory.shard.group must be at least 2, got {self.group}: one process shares with none")

    def refuse(self, others: Mapping[str, bool]) -> None:
        """Raises: ValueError where one of these other ways to save memory is turned on."""
        for name, on in others.items():
            if on:
                raise ValueError(
                    f"memory.shard does not go with memory.{name}: shards are kept as plain weights on the device; "
                    "drop one"
                )

    def parts(self, processes: int) -> int:
        """Processes out of so many that hold all weights between them."""
        return self.group or processes

    def mesh(self, device: torch.device) -> DeviceMesh:
        """Of all processes: a line of shards, or a row of shards for each copy.

        Raises: ValueError where groups of that size do not come out even.
        """
        from torch.distributed.device_mesh import init_device_mesh

        world = world_size()
        group = self.parts(world)
        if world % group:
            raise ValueError(
                f"memory.shard.group {group} does not divide the {world} processes that were started; each group "
                "holds one whole copy of the weights"
            )
        if group == world:
            return init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))
        return init_device_mesh(device.type, (world // group, group), mesh_dim_names=("replicate", "shard"))


def shard(
    network: nn.Module,
    settings: Shard,
    device: torch.device,
    whole: Sequence[nn.Parameter] = (),
    fresh: Callable[[], None] | None = None,
) -> None:
    """Shard a network in place, block by block, and have its calls met (`flowalign.meeting`).

    Gradients of sharded weights are summed over processes, as losses are divided by the number of all samples already.

    Args:
        device: of the calls. whole: parameters that stay as they are on each process. fresh: as of `Meeting.add`.

    Raises: ValueError for a network without blocks.
    """
    from torch.distributed.fsdp import fully_shard

    from flowalign.meeting import meeting

    found = blocks(network)
    if not found:
        raise ValueError(f"{type(network).__name__} does not tell its blocks, which memory.shard would gather in turn")
    mesh, ignored = settings.mesh(device), {*whole}
    for part in (*found, network):
        part.register_forward_hook(_no_views)
        sharded: Any = fully_shard(part, mesh=mesh, reshard_after_forward=True, ignored_params=ignored)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)
    for one in whole:
        one.data = one.data.to(device)
    meeting().add(network, device, fresh)


def _no_views(_: nn.Module, __: Any, output: Any) -> Any:
    """What is gone back through has memory of its own: a view's hooks would be lost with a change in place."""
    if not torch.is_grad_enabled():
        return output
    return tree_map_only(Tensor, lambda one: one if one._base is None else one.clone(), output)


def spread(
    pipeline: Any, networks: Sequence[str], settings: Shard | None, device: torch.device, whole: Sequence[nn.Parameter]
) -> bool:
    """Shard a pipeline's networks, and text encoders if asked to, where there are several processes; returns whether.

    Args:
        whole: parameters of any of them that stay as they are on each process.
    """
    if settings is None or world_size() == 1:
        return False
    for name, part in pipeline.components.items():
        encoder = name.startswith("text_encoder") and settings.encoders
        if isinstance(part, nn.Module) and (encoder or name in networks):
            own = {id(one) for one in part.parameters()}
            shard(part, settings, device, [one for one in whole if id(one) in own])
    return True


def blocks(network: nn.Module) -> list[nn.Module]:
    """The parts of a network that are gathered as one, inner ones first: those that its library says stay together."""
    told = (getattr(network, name, None) or () for name in ("_no_split_modules", "_repeated_blocks"))
    names = {name for some in told for name in some}
    inside = [*network.modules()][1:]
    found = [one for one in inside if type(one).__name__ in names and any(True for _ in one.parameters())]
    listed = [one for part in inside if isinstance(part, nn.ModuleList) for one in part]
    return [*reversed(found or [one for one in listed if any(True for _ in one.parameters())])]


def plain_class(network: nn.Module) -> type[Any]:
    """A network's class as its library knows it."""
    from torch.distributed.fsdp import FSDPModule

    return next(kind for kind in type(network).__mro__ if not issubclass(kind, FSDPModule))
