"""What a model will take of a device's memory, before it does: weights from shapes, activations from a run on fakes.

A fake tensor (`torch._subclasses.FakeTensor`) has shape, dtype and device but no numbers, so that a call of the network
and its backward take no memory and little time, while autograd keeps of it what it would keep of a real one.
"""

from __future__ import annotations

import copy
import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flowalign.adapters import POLICY, START, add_adapter
from flowalign.models.memory import Memory, linear_layers
from flowalign.models.pipeline import PipelineModel
from flowalign.records import Condition
from flowalign.sharding import plain_class

ADAPTERS = (f".{POLICY}.", f".{START}.")
BLOCK = 64  # numbers that share a scale in nf4
MIDDLE = 0.5  # a sigma; activations are the same at all of them


@dataclass(frozen=True)
class Activations:
    """Bytes of one call of the network with gradient.

    saved: that autograd keeps of its forward, parameters not counted.
    peak: the most that is held at once in forward and backward, gradients of the policy among it.
    """

    saved: int
    peak: int


class Saved:
    """Counts each storage that autograd keeps, once; those of parameters and buffers not."""

    def __init__(self, *networks: nn.Module) -> None:
        held = [value for network in networks for value in (*network.parameters(), *network.buffers())]
        self._seen = {id(value.untyped_storage()) for value in held}
        self.bytes = 0

    def pack(self, value: Tensor) -> Tensor:
        """To be given to `saved_tensors_hooks`."""
        storage = value.untyped_storage()
        if id(storage) not in self._seen:  # the graph holds it, so that no other gets its id
            self._seen.add(id(storage))
            self.bytes += storage.nbytes()
        return value


class Peak(TorchDispatchMode):
    """While entered, follows how many bytes tensors hold that were made since; `most` is the most of it."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._held: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {id(one.untyped_storage()) for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
        for value in tree_leaves(made):
            if isinstance(value, Tensor) and id(value.untyped_storage()) not in given:
                self._follow(value.untyped_storage())
        self.most = max(self.most, self.now)
        return made

    def _follow(self, storage: Any) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._held:
            return
        self.now += size
        self._held[key] = weakref.ref(storage, partial(self._gone, key, size))

    def _gone(self, key: int, size: int, _: Any) -> None:
        self.now -= size
        self._held.pop(key, None)


class AllTrue(TorchDispatchMode):
    """While entered, the rows that a mask chooses are all rows, the most they can be: one of fakes has no numbers."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.index.Tensor and len(args[1]) == 1 and args[1][0].dtype == torch.bool:
            args = args[0], [torch.arange(len(args[0]), device=args[0].device)]
        return func(*args, **(kwargs or {}))


def activations(
    model: PipelineModel,
    condition: Condition,
    gradient_checkpointing: bool,
    precision: torch.dtype | None = None,
    guidance_scale: float = 1.0,
) -> Activations:
    """Of one call with gradient for the rows of a condition, as a model of these settings makes it.

    precision: of the call, None for the model's own.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    shadow, networks = _shadow(model, mode, precision)
    for network in networks if gradient_checkpointing else ():
        network.enable_gradient_checkpointing()
    with mode:
        told, latents = _inputs(model, condition)
        saved = Saved(*networks)
        with Peak() as peak, AllTrue():
            with saved_tensors_hooks(saved.pack, lambda value: value):
                velocity = shadow.network(latents, MIDDLE, told, False, guidance_scale)
            velocity.square().sum().backward()
    return Activations(saved.bytes, peak.most)


def sampling_peak(
    model: PipelineModel, condition: Condition, precision: torch.dtype | None = None, guidance_scale: float = 1.0
) -> int:
    """Bytes held at most in a call without gradient for the rows of a condition, guided by one doubled call or none."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    shadow, _ = _shadow(model, mode, precision)
    with mode, torch.no_grad():
        told, latents = _inputs(model, condition)
        with Peak() as peak, AllTrue():
            if model.calls(guidance_scale, MIDDLE) == 1:
                shadow.network(latents, MIDDLE, told, False, guidance_scale)
            else:
                shadow.network_doubled(latents, MIDDLE, told)
    return peak.most


def _inputs(model: PipelineModel, condition: Condition) -> tuple[Condition, Tensor]:
    return condition.to(model.device), torch.empty(len(condition), *model.latent_shape, device=model.device)


def decode_peak(model: PipelineModel, rows: int, score: Callable[[Tensor], Tensor] | None = None) -> int:
    """Bytes held at most while so many pictures are decoded: without gradient, or scored and gone back through.

    score: a number of each picture, with gradient.

    Raises: RuntimeError where it looks at the pictures' numbers, which a fake does not have.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    shadow = copy.copy(model)
    shadow.pipeline = copy.copy(model.pipeline)
    vae = type(model.pipeline.vae)
    with mode, torch.set_grad_enabled(score is not None):
        made = vae.from_config(model.pipeline.vae.config)
        made.use_slicing, made.use_tiling = model.pipeline.vae.use_slicing, model.pipeline.vae.use_tiling
        _cast(made, model.pipeline.vae.dtype, model.device)
        object.__setattr__(shadow.pipeline, "vae", made)
        latents = torch.empty(rows, *model.latent_shape, device=model.device, requires_grad=score is not None)
        with Peak() as peak:
            pixels = shadow.decode(latents)
            if score is not None:
                score(pixels).sum().backward()
    return peak.most


def _shadow(
    model: PipelineModel, mode: FakeTensorMode, precision: torch.dtype | None
) -> tuple[PipelineModel, list[Any]]:
    """The model with networks of fakes in place of its own, which it does not share anything with."""
    network: Any = model.module
    others = {name: getattr(model.pipeline, name) for name in model.beside}
    with torch.device("meta"):
        made = plain_class(network).from_config(network.config)
        if not model.policy.whole:
            add_adapter(made, network.peft_config[POLICY], POLICY)
        beside = {name: type(part).from_config(part.config) for name, part in others.items()}
    shadow = copy.copy(model)
    shadow.call, shadow.beside = made, beside
    if precision is not None:
        shadow.dtype, shadow._autocast = precision, None if precision == torch.float32 else precision
    with mode:
        for part in (made, *beside.values()):
            _cast(part, shadow.dtype, model.device, model.policy.whole and part is made)
    return shadow, [made, *beside.values()]


def _cast(module: nn.Module, dtype: torch.dtype, device: torch.device, whole: bool = False) -> None:
    """Make all of a module's tensors fakes: the policy, or all of it, in float32 and trained, else in the dtype."""
    for name, part in module.named_modules():
        policy = whole or f".{POLICY}" in name
        for own, value in part._parameters.items():
            if value is not None:
                fake = torch.empty(value.shape, dtype=torch.float32 if policy else dtype, device=device)
                part._parameters[own] = nn.Parameter(fake, requires_grad=policy)
        for held in (part._buffers, vars(part)):
            for own, value in [*held.items()]:
                if isinstance(value, Tensor):
                    kind = dtype if value.is_floating_point() and held is part._buffers else value.dtype
                    held[own] = torch.empty(value.shape, dtype=kind, device=device)


def stored_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes that tensors hold, those of packed ones included; a storage that several share is counted once."""
    held = {id(part.untyped_storage()): part.untyped_storage() for one in tensors for part in _parts(one)}
    return sum(storage.nbytes() for storage in held.values())


def _parts(value: Any) -> Iterator[Tensor]:
    names = value.__tensor_flatten__()[0] if "__tensor_flatten__" in dir(type(value)) else None
    if names is not None:  # torchao's
        yield from (getattr(value, name) for name in names)
        return
    yield value
    scales = [vars(value).get("SCB"), vars(value).get("quant_state")]  # bitsandbytes'
    for one in scales:
        known = one if isinstance(one, Tensor) else vars(one).get("absmax") if one is not None else None
        if known is not None:
            yield known


def weight_bytes(part: nn.Module, memory: Memory, dtype: torch.dtype | None, encoder: bool = False) -> dict[str, int]:
    """What a component's frozen weights will take, by what they are stored as; from shapes alone.

    Args:
        dtype: of what is not packed; None for as it is.
        encoder: whether it is a text encoder, which `memory.quantize_encoders` is about; else it is the network.
    """
    kind = memory.quantize_encoders if encoder else memory.quantize
    packed = {*linear_layers(part)} if kind != "no" else set[str]()
    cast = set[str]() if encoder or not memory.layerwise_casting else _cast_layers(part)
    found, seen = dict[str, int](), set[int]()
    for name, module in part.named_modules():
        if any(mark in f"{name}." for mark in ADAPTERS):
            continue
        for own, value in module._parameters.items():
            if value is None or id(value) in seen:
                continue
            seen.add(id(value))
            if name in packed and own == "weight":
                stored, size = str(kind), packed_bytes(module, kind)  # type: ignore[arg-type]
            else:
                single = torch.float8_e4m3fn if name in cast else dtype or _dtype(value)
                stored, size = str(single).removeprefix("torch."), _numel(module, own, value) * single.itemsize
            found[stored] = found.get(stored, 0) + size
    known = {id(one): one for one in part.buffers()}.values()
    buffers = sum(
        one.numel() * (dtype or one.dtype if one.is_floating_point() else one.dtype).itemsize for one in known
    )
    return found | ({"buffers": buffers} if buffers else {})


def packed_bytes(layer: nn.Linear, kind: str) -> int:
    """A linear layer's weight with its scales: one for each row, or for each 64 numbers of nf4, in float32."""
    numbers, rows = layer.in_features * layer.out_features, layer.out_features
    return -(-numbers // 2) + 4 * -(-numbers // BLOCK) if kind == "nf4" else numbers + 4 * rows


def _numel(module: nn.Module, own: str, value: Tensor) -> int:
    if isinstance(module, nn.Linear) and own == "weight":  # packed ones have another shape
        return module.in_features * module.out_features
    return value.numel()


def _dtype(value: Tensor) -> torch.dtype:
    return value.dtype if value.is_floating_point() and value.dtype.itemsize > 1 else torch.float32


def _cast_layers(network: nn.Module) -> set[str]:
    """The layers that layerwise casting keeps in fp8: as diffusers chooses them, without convolutions."""
    from diffusers.hooks.layerwise_casting import DEFAULT_SKIP_MODULES_PATTERN as DEFAULTS

    own = (getattr(network, name, None) or () for name in ("_keep_in_fp32_modules", "_skip_layerwise_casting_patterns"))
    patterns = [re.compile(one) for one in (*DEFAULTS, *(pattern for some in own for pattern in some))]

    def skipped(name: str) -> bool:
        parts = name.split(".")
        prefixes = (".".join(parts[: i + 1]) for i in range(len(parts)))
        return any(pattern.search(prefix) for prefix in prefixes for pattern in patterns)

    kinds = (nn.Linear, nn.Embedding)
    return {name for name, one in network.named_modules() if isinstance(one, kinds) and not skipped(name)}


def copied_bytes(network: nn.Module, dtype: torch.dtype) -> int:
    """The weights of the largest of a network's blocks in a dtype: what its backward holds where calls copy weights."""
    lists = [part for part in network.modules() if isinstance(part, nn.ModuleList)]
    blocks = [sum(one.in_features * one.out_features for one in block.modules() if isinstance(one, nn.Linear))
              for part in lists for block in part]  # fmt: skip
    return max(blocks, default=0) * dtype.itemsize


def components(model: PipelineModel) -> Mapping[str, nn.Module]:
    """The pipeline's networks by name."""
    return {name: part for name, part in model.pipeline.components.items() if isinstance(part, nn.Module)}
