"""LoRA through peft: a policy to train, and the reference it is held to.

Networks of most families take adapters by methods of diffusers' own (`PeftAdapterMixin`), and their pipelines read and
write them (`load_lora_weights`). Of some networks diffusers has not both. Their policies are peft's own folders,
adapter_model.safetensors beside adapter_config.json, as `peft.PeftModel.from_pretrained(network, folder)` reads them.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.loaders import PeftAdapterMixin
from diffusers.loaders.lora_base import LoraBaseMixin
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flowalign.lora_files import PEFT_CONFIG, PEFT_PREFIX, PEFT_WEIGHTS, adapter_settings, read_lora
from flowalign.sharding import plain_class
from flowalign.user_errors import written_to

POLICY = "policy"
START = "start"

Reference = Literal["base", "start"]
Use = Literal["policy", "base", "start"]


@dataclass(frozen=True)
class LoRA:
    """A low-rank policy; Flow-GRPO's settings are the defaults.

    Args:
        rank, alpha: the update is alpha / rank times B A.
        targets: suffixes of the modules to adapt; None for the model family's own.
        start: a folder or file of LoRA weights to go on from; rank and alpha are then that file's.
        reference: what `Model.reference()` is. "base": no adapter. "start": a frozen copy of the policy as it started,
            for a policy that goes on from another LoRA and should stay near it.
    """

    rank: int = 32
    alpha: int = 64
    targets: tuple[str, ...] | None = None
    start: str | None = None
    reference: Reference = "base"

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha < 1:
            raise ValueError(f"LoRA rank and alpha must be at least 1, got {self.rank} and {self.alpha}")


def add_policy(pipeline: Any, network: nn.Module, lora: LoRA, family_targets: tuple[str, ...], seed: int = 0) -> None:
    """Freeze the network and give it a trainable adapter, A gaussian and B zero, or that of `lora.start`.

    Raises: ValueError where a target names no module, or `lora.start` holds no LoRA.
    """
    network.requires_grad_(False)
    if lora.start is not None:
        _load(pipeline, network, lora.start, POLICY)
        if lora.reference == "start":
            _load(pipeline, network, lora.start, START)
    else:
        targets = lora.targets or family_targets
        _check_targets(network, targets)
        config = LoraConfig(
            r=lora.rank, lora_alpha=lora.alpha, init_lora_weights="gaussian", target_modules=list(targets)
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            add_adapter(network, config, POLICY)
    _activate(network, POLICY)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(f".{POLICY}." in name)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def add_adapter(network: nn.Module, config: LoraConfig, name: str) -> None:
    """Put an adapter on a network and make it the one in use."""
    if isinstance(network, PeftAdapterMixin):
        network.add_adapter(config, adapter_name=name)
    else:
        inject_adapter_in_model(config, network, name)
        _activate(network, name)


def _activate(network: nn.Module, name: str) -> None:
    for layer in _layers(network):
        layer.set_adapter([name])


def _layers(network: nn.Module) -> list[BaseTunerLayer]:
    return [module for module in network.modules() if isinstance(module, BaseTunerLayer)]


def _check_targets(network: nn.Module, targets: tuple[str, ...]) -> None:
    names = [name for name, _ in network.named_modules()]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise ValueError(f"LoRA target {target!r} names no module of {type(network).__name__}")


def _load(pipeline: Any, network: nn.Module, path: str, name: str) -> None:
    if not Path(path).exists():
        raise ValueError(f"{path} does not exist: LoRA.start is a folder or file of LoRA weights")
    if _by_pipeline(pipeline, network):
        try:
            with _text_encoders_left_out():
                pipeline.load_lora_weights(path, adapter_name=name, use_safetensors=True)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} holds no LoRA in safetensors, and pickled ones are not read: {error}") from error
    else:
        _load_by_peft(network, path, name)


@contextmanager
def _text_encoders_left_out() -> Iterator[None]:
    """While entered, diffusers does not warn that a LoRA has no part for each of the text encoders; ours never have."""

    def told(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("No LoRA keys associated to ")

    log = logging.getLogger("diffusers.loaders.lora_base")  # of the network it warns elsewhere
    log.addFilter(told)
    try:
        yield
    finally:
        log.removeFilter(told)


def _by_pipeline(pipeline: Any, network: nn.Module) -> bool:
    """Whether the pipeline itself reads and writes a network's LoRAs."""
    names = pipeline._lora_loadable_modules if isinstance(pipeline, LoraBaseMixin) else ()
    named = any(getattr(pipeline, name, None) is network for name in names)
    return named and isinstance(network, PeftAdapterMixin)


def _load_by_peft(network: nn.Module, path: str, name: str) -> None:
    """A LoRA of peft's or diffusers' layout, by its modules' names without the network's."""
    factors = {module.partition(".")[2]: one for module, one in read_lora(path).factors.items()}
    known = dict(network.named_modules())
    unknown = [module for module in factors if module not in known]
    if unknown:
        raise ValueError(f"{path} is a LoRA of {unknown[0]}, which {type(network).__name__} does not have")
    with torch.random.fork_rng(devices=[]):
        add_adapter(network, LoraConfig(**adapter_settings(factors)), name)
    weights = dict[str, Tensor]()
    for module, one in factors.items():
        weights |= {f"{module}.lora_A.weight": one.down, f"{module}.lora_B.weight": one.up}
    set_peft_model_state_dict(network, weights, adapter_name=name)


def policy_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's parameters by name, in the network's order."""
    return {name: p for name, p in network.named_parameters() if f".{POLICY}." in name}


@contextmanager
def as_reference(network: nn.Module, reference: Reference) -> Iterator[None]:
    """While entered, the network runs without the policy's adapter, or with the frozen copy of its start.

    The policy's parameters alone have gradients, as before: the reference does not run them, and that copy is frozen.
    """
    layers = _layers(network)
    before = _in_use(layers)
    _use(layers, reference)
    try:
        yield
    finally:
        _use(layers, before)


def _in_use(layers: Sequence[BaseTunerLayer]) -> Use:
    """What the adapted layers of a network, or of a block of one, run with: all are alike."""
    for layer in layers:
        if layer.disable_adapters:
            return "base"
        return "start" if START in layer.active_adapters else "policy"
    return "policy"


def _use(layers: Sequence[BaseTunerLayer], what: Use) -> None:
    """Say what adapted layers run with, and nothing else.

    peft's own switches walk over all parameters to say which of them have gradients, which changes nothing here (what
    is not run has none, and the copy of the start is frozen) and takes 17 ms of the 342 layers of a FLUX policy.
    """
    for layer in layers:
        layer._disable_adapters = what == "base"
        if what != "base":
            layer._active_adapter = [START if what == "start" else POLICY]
    assert _in_use(layers) == what or not layers, "this version of peft keeps what a layer runs with somewhere else"


def as_now(network: nn.Module) -> AbstractContextManager[None]:
    """What runs a network later as it runs now, for calls that a backward pass makes anew.

    By then a reference may have been left or entered; that is changed and put back. That the policy's weights are
    others is an error, as it is for a call that is not made anew.
    """
    layers, weights = _layers(network), [*policy_parameters(network).values()]
    held, versions = _in_use(layers), [one._version for one in weights]  # how often each has been written to

    @contextmanager
    def entered() -> Iterator[None]:
        written = [one._version for one in weights]
        assert written == versions, "the policy's weights have changed between forward and backward pass"
        now = _in_use(layers)
        if now == held:
            yield
            return
        _use(layers, held)
        try:
            yield
        finally:
            _use(layers, now)

    return entered()


def recomputed(block: Any, *arguments: Any) -> Any:
    """A block's call with activation checkpointing, for diffusers' `enable_gradient_checkpointing`; see `as_now`.

    Args:
        block: a module, or its bound `__call__`, as some of diffusers' networks hand it over.
    """
    if torch.compiler.is_compiling():  # whose backward pass is traced together with the forward pass
        return checkpoint(block, *arguments, use_reentrant=False)
    part: nn.Module = getattr(block, "__self__", block)
    return checkpoint(block, *arguments, use_reentrant=False, context_fn=lambda: (nullcontext(), as_now(part)))


def save_policy(pipeline: Any, network: nn.Module, folder: Path, network_name: str = "transformer") -> None:
    """Write the adapter as diffusers' `load_lora_weights` reads it, rank and alpha in its metadata; else as peft does.

    network_name: what the pipeline calls the network, "transformer", "unet" or "controlnet".
    """
    folder.mkdir(parents=True, exist_ok=True)
    config: Any = network.peft_config[POLICY]  # type: ignore[index]
    settings = {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}
    weights = get_peft_model_state_dict(network, adapter_name=POLICY)
    layers = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    if _by_pipeline(pipeline, network):
        told = {f"{network_name}_lora_layers": layers, f"{network_name}_lora_adapter_metadata": settings}
        with written_to(folder):
            pipeline.save_lora_weights(str(folder), **told)  # metadata in one order: equal policies are equal files
    else:
        named = {PEFT_PREFIX + name: value for name, value in layers.items()}
        settings["auto_mapping"] = {  # as peft itself tells what a LoRA is of
            "base_model_class": plain_class(network).__name__, "parent_library": plain_class(network).__module__,
        }  # fmt: skip
        with written_to(folder / PEFT_WEIGHTS):
            save_file(named, folder / PEFT_WEIGHTS, metadata={"format": "pt"})
        (folder / PEFT_CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True))
