"""Full fine-tuning: all weights of a network are the policy, and its reference is a frozen copy."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from flowalign.distributed import rank
from flowalign.sharding import Shard, plain_class, shard
from flowalign.shards import is_sharded, own_rows, whole_tensor
from flowalign.user_errors import written_to

NETWORKS = ("transformer", "unet", "controlnet")  # as pipelines name them
CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"  # diffusers' own names


@dataclass(frozen=True)
class Full:
    """Train all of a network's weights, in float32.

    Beside them there are a gradient, the optimizer's two moments and, unless `optimizer.ema_decay` is 0, the average,
    each of their size; and a frozen copy of the start where the loss reads a reference. What `memory.shard` shards is
    all of these.

    Args:
        start: a folder of weights in diffusers' layout to go on from, as a run leaves them; None for the pipeline's.
    """

    start: str | None = None


def is_network(folder: Path) -> bool:
    """Whether a folder holds all weights of a network, in diffusers' layout."""
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def weights_in(run: Path) -> Path:
    """Where a run has left its policy: its LoRA's folder, or after full fine-tuning that of the network."""
    return next((run / name for name in NETWORKS if is_network(run / name)), run / "lora")


def train_all(network: nn.Module, full: Full) -> None:
    """Make all of a network's weights trainable float32.

    Raises: ValueError where `full.start` holds no weights of such a network.
    """
    if full.start is not None:
        _load(network, full.start)
    for parameter in network.parameters():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)


def _load(network: nn.Module, folder: str) -> None:
    if not (Path(folder) / CONFIG).is_file():
        raise ValueError(
            f"{folder} holds no {CONFIG}: Full.start is a folder of a network's weights, in diffusers' layout"
        )
    kind: Any = plain_class(network)
    try:
        network.load_state_dict(kind.from_pretrained(folder).state_dict())
    except (OSError, RuntimeError) as error:
        told = " ".join(str(error).split())[:300]
        raise ValueError(f"{folder} holds no weights of this {kind.__name__}: {told}") from error


def frozen_copy(
    network: Any,
    settings: Shard | None,
    device: torch.device,
    values: Callable[[], Mapping[str, Tensor]] | None = None,
) -> Any:
    """A copy that does not share anything with the network; whose calls one process makes alone.

    Args:
        settings: how both are sharded, None for not at all. values: what a copy in shards becomes before each call, by
            name; None for that it stays.
    """
    if settings is None and network._parallel_config is None:  # the hooks that cut calls are not to be copied
        return copy.deepcopy(network).requires_grad_(False)
    with torch.device("meta"):
        made: Any = plain_class(network).from_config(network.config)
    made.requires_grad_(False).eval()
    for own, other in zip(made.modules(), network.modules(), strict=True):
        for name, value in [*vars(other).items()]:  # such as tables of positions
            if isinstance(value, Tensor):
                setattr(own, name, value.clone())
    if settings is not None:
        shard(made, settings, device, fresh=None if values is None else partial(_take_over, made, values, []))
    made.to_empty(device=device)
    with torch.no_grad():
        for mine, theirs in ((made.parameters(), network.parameters()), (made.buffers(), network.buffers())):
            for one, value in zip(mine, theirs, strict=True):
                one.copy_(value)
    return made


@torch.no_grad()
def _take_over(
    network: nn.Module, values: Callable[[], Mapping[str, Tensor]], last: list[Mapping[str, Tensor]]
) -> None:
    """Make weights in shards what they are to be, unless they were made that last time."""
    now = values()
    if not now or (last and last[0] is now):
        return
    for name, value in network.named_parameters():
        own_rows(value).copy_(own_rows(now[name]))
    last[:] = [now]


def weights_of(network: nn.Module) -> dict[str, Tensor]:
    """All weights by name; of a network in shards whole ones on the host of the first process, and none on others.

    To be called by all processes together.
    """
    found = dict[str, Tensor]()
    for name, value in network.state_dict().items():
        whole = whole_tensor(value)
        if not is_sharded(value) or rank() == 0:
            found[name] = whole.detach().cpu().contiguous()
    return found


def write_network(network: Any, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Weights with the network's config, as `from_pretrained` reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads(network.to_json_string()) | {"_class_name": plain_class(network).__name__}
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    with written_to(folder / WEIGHTS):
        save_file(dict(weights), folder / WEIGHTS, {"format": "pt"})
