"""How a big model is made to fit one card: what its weights are stored as, where they wait, and how it is decoded."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from flowalign.context_parallel import ContextParallel
from flowalign.distributed import world_size
from flowalign.sharding import Shard

Quantization = Literal["no", "int8", "fp8", "nf4", "int8_bnb"]
Offload = Literal["no", "group", "encoders"]
PACKAGES = {"int8": "torchao", "fp8": "torchao", "nf4": "bitsandbytes", "int8_bnb": "bitsandbytes"}
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Memory:
    """What is done to make a model fit; nothing by default. The policy itself always stays float32 on the device.

    Args:
        quantize: the frozen network's linear layers, weights only: "int8" and "fp8" by torchao, "nf4" (QLoRA,
            arXiv:2305.14314) and "int8_bnb" (LLM.int8(), arXiv:2208.07339) by bitsandbytes; all need the extra [quant].
            Layers that diffusers or transformers keep in float32 are left alone.
        quantize_encoders: the same of the text encoders.
        offload: "encoders" for text encoders that are on the device only while they encode; "group" for the network's
            linear layers too, each brought to the device for its own call (diffusers' group offloading, on a stream of
            its own under CUDA).
        layerwise_casting: keep the network's linear layers in fp8 (e4m3) and cast each for its own call.
        vae_slicing, vae_tiling: decode one picture, and one tile, at a time, both with gradient. Tiles differ from the
            whole at their seams.
        attention: diffusers' name of an attention backend: "native", "flash", "xformers", "_native_efficient", ...
        trajectory_on_cpu: an epoch's stored steps wait on the host for their update.
        shard: of many processes each holds a part of the frozen network alone; see `Shard`. {} for its defaults.
        context_parallel: of many processes several make each call, each on some of its tokens; see `ContextParallel`.

    Not promised: that a quantised model's rollouts are those of the same model in full; they only are its own replay's.

    Raises: ValueError for what cannot be combined, and for an attention backend that diffusers does not know.
    """

    quantize: Quantization = "no"
    quantize_encoders: Quantization = "no"
    offload: Offload = "no"
    layerwise_casting: bool = False
    vae_slicing: bool = False
    vae_tiling: bool = False
    attention: str = "native"
    trajectory_on_cpu: bool = False
    shard: Shard | None = None
    context_parallel: ContextParallel | None = None

    def __post_init__(self) -> None:
        from diffusers.models.attention_dispatch import AttentionBackendName

        known = [backend.value for backend in AttentionBackendName]
        if self.attention not in known:
            raise ValueError(f"attention must be one of diffusers' backends {', '.join(known)}, got {self.attention!r}")
        if "sage" in self.attention:
            raise ValueError(
                f"attention {self.attention!r} has no backward pass, and a policy is trained through attention; "
                "take flash or xformers"
            )
        if self.quantize != "no" and self.layerwise_casting:
            raise ValueError(f"layerwise_casting would cast weights that quantize {self.quantize} has packed; drop one")
        if self.quantize != "no" and self.offload == "group":
            raise ValueError(
                f"offload: group moves a layer's weight alone, and quantize {self.quantize} keeps it in several "
                "tensors; drop one, or take offload: encoders"
            )
        if self.shard is not None:
            encoders = self.shard.encoders
            self.shard.refuse({
                f"quantize: {self.quantize}": self.quantize != "no",
                "layerwise_casting": self.layerwise_casting,
                "offload: group": self.offload == "group",
                f"quantize_encoders: {self.quantize_encoders}": encoders and self.quantize_encoders != "no",
                "offload: encoders": encoders and self.offload == "encoders",
            })  # fmt: skip

    def check(self, gradient_checkpointing: bool, compiled: bool, device: torch.device) -> None:
        """Raises: ValueError where the model's other settings make one of these useless or wrong."""
        cast = [name for name, on in self._casts().items() if on]
        if cast and not gradient_checkpointing:
            raise ValueError(
                f"memory.{cast[0]} needs gradient_checkpointing: without it the graph of a call keeps each layer's "
                "weight as it was brought or cast for that call, which takes more memory than is saved"
            )
        hooked = self.layerwise_casting or self.offload == "group"
        if hooked and compiled:
            raise ValueError("compile does not go with memory.layerwise_casting or memory.offload: group, whose hooks "
                             "replace weights at every call; drop one")  # fmt: skip
        if self.shard is not None and compiled:
            raise ValueError("compile does not go with memory.shard: processes join in each other's calls; drop one")
        if self.context_parallel is not None:
            self.context_parallel.check(self.attention, compiled, device)
        if "nf4" in (self.quantize, self.quantize_encoders) and device.type == "cpu":
            raise ValueError("memory: nf4 is for GPUs; bitsandbytes' CPU code takes layers of some sizes only")
        if not (self.attention == "flex" or self.attention.startswith(("native", "_native"))) and device.type != "cuda":
            raise ValueError(f"memory.attention {self.attention} is for CUDA, and the model is on {device}")

    def _casts(self) -> dict[str, bool]:
        """What makes a full copy of a layer's weight at each call, for the graph to keep."""
        return {
            "quantize": self.quantize in ("int8", "fp8"),
            "offload: group": self.offload == "group",
            "layerwise_casting": self.layerwise_casting,
        }

    @property
    def copies_weights(self) -> bool:
        """Whether a call makes a full copy of each layer's weight."""
        return any(self._casts().values())


def load_dtypes(
    networks: Sequence[str], precision: torch.dtype | None, decode: torch.dtype | None, whole: str | None = None
) -> dict[str, torch.dtype]:
    """What each component's weights are read as: networks and text encoders as the calls take them, all else float32.

    Args:
        networks: names of components. precision: of the networks' calls, None for float32. decode: of the VAE's.
        whole: that of the networks all of whose weights are trained, in float32.
    """
    names = (*networks, "text_encoder", "text_encoder_2", "text_encoder_3")
    chosen = {} if precision is None else {name: precision for name in names if name != whole}
    return {"default": torch.float32, **chosen, "vae": decode or torch.float32}


def place(
    pipeline: Any, networks: Sequence[str], memory: Memory, dtype: torch.dtype | None, device: torch.device,
    whole: str | None = None,
) -> None:  # fmt: skip
    """Freeze, cast, quantise and move a pipeline's components; to be called before the policy is added.

    Args:
        networks: names of the components that predict. dtype: of these but `whole`, None for as they are.
    """
    for name, part in pipeline.components.items():
        if not isinstance(part, nn.Module):
            continue
        part.requires_grad_(False).eval()
        encoder, network = name.startswith("text_encoder"), name in networks
        if network and dtype is not None and name != whole:
            nn.Module.to(part, dtype)  # diffusers' own `to` warns that nothing is kept float32
        kind = memory.quantize if network else memory.quantize_encoders if encoder else "no"
        if kind != "no":
            quantize(part, kind, device)
        waits = (network and memory.offload == "group") or (encoder and memory.offload != "no")
        if memory.shard is not None and world_size() > 1:  # a whole one may not fit there
            waits = waits or network or (encoder and memory.shard.encoders)
        nn.Module.to(part, torch.device("cpu") if waits else device)
    if memory.vae_slicing:
        pipeline.vae.enable_slicing()
    if memory.vae_tiling:
        pipeline.vae.enable_tiling()


def finish(network: Any, memory: Memory, dtype: torch.dtype, device: torch.device) -> None:
    """What has to come after the policy was added, so that it is left out: hooks on the frozen layers; and attention.

    dtype: that layers are cast to for their calls.
    """
    if memory.layerwise_casting:
        # autograd keeps a convolution's parameter itself, cast back by then; of a linear layer it keeps the cast copy
        network.enable_layerwise_casting(torch.float8_e4m3fn, dtype, skip_modules_classes=CONVOLUTIONS)
    if memory.offload == "group":
        offload_linear(network, device)
    for _, parameter in network.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(device)
    _set_attention(network, memory.attention)


def offload_linear(network: Any, device: torch.device, folder: str | None = None) -> None:
    """Bring each frozen linear layer to the device for its own call; all else is moved there for good.

    A linear layer's graph keeps the copy that was brought; that of a norm or a convolution keeps the parameter, which
    would be on the host by the time of its backward.

    Args:
        folder: where layers wait in files, None for on the host.
    """
    from diffusers.hooks import HookRegistry

    stream = device.type == "cuda"
    network.enable_group_offload(  # record_stream: a copy's memory is not taken anew while a backward still reads it
        device, torch.device("cpu"), "leaf_level", use_stream=stream, record_stream=stream, offload_to_disk_path=folder
    )
    for module in network.modules():
        hook = HookRegistry.check_if_exists_or_initialize(module).get_hook("group_offloading")
        frozen = isinstance(module, nn.Linear) and not module.weight.requires_grad
        if hook is None or frozen:
            continue
        hook.group.onload_()
        hook.group.modules, hook.group.parameters, hook.group.buffers = [], [], []
        hook.group.cpu_param_dict, hook.group.offload_to_disk_path = {}, None


def _set_attention(network: Any, name: str) -> None:
    if name == "native":
        return
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as Registry

    takes = any("_attention_backend" in dir(module) for module in network.attn_processors.values())
    try:
        if takes:
            others, _ = Registry.get_active_backend()  # of other networks in this process
            network.set_attention_backend(name)
            Registry.set_active_backend(others)
        elif name == "xformers":
            network.enable_xformers_memory_efficient_attention()
        else:
            raise ValueError(f"{type(network).__name__} takes no attention backend but native and xformers")
    except (RuntimeError, ImportError) as error:
        raise ValueError(f"memory.attention {name} cannot be had: {' '.join(str(error).split())}") from error


def device_of(pipeline: Any) -> torch.device:
    """Where a pipeline was moved; if it was not, CUDA if there is one."""
    if pipeline.device.type != "cpu" or not torch.cuda.is_available():
        return torch.device(pipeline.device)
    return torch.device("cuda")


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """Calls in that precision; None for as the weights are."""
    return torch.autocast(device.type, dtype) if dtype else nullcontext()


@contextmanager
def encoders_on(pipeline: Any, memory: Memory, device: torch.device) -> Iterator[None]:
    """While entered, the text encoders are on the device."""
    parts = [part for name, part in pipeline.components.items() if name.startswith("text_encoder")]
    waiting = [part for part in parts if isinstance(part, nn.Module) and memory.offload != "no"]
    for part in waiting:
        nn.Module.to(part, device)
    try:
        yield
    finally:
        for part in waiting:
            nn.Module.to(part, torch.device("cpu"))


def linear_layers(module: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers that are quantised: all that the model does not ask to be kept in float32, by name."""
    kept = tuple(getattr(module, "_keep_in_fp32_modules", None) or ())
    found = {name: one for name, one in module.named_modules() if isinstance(one, nn.Linear)}
    return {name: one for name, one in found.items() if not {*name.split(".")} & {*kept}}


def quantize(module: nn.Module, kind: Quantization, device: torch.device) -> None:
    """Pack the weights of a module's linear layers on the device, one after the other.

    Raises: ValueError where the package is not installed.
    """
    try:
        library = importlib.import_module(PACKAGES[kind])
    except ImportError as error:
        raise ValueError(
            f"quantize {kind} needs {PACKAGES[kind]}: pip install {PACKAGES[kind]} (or the extra [quant])"
        ) from error
    layers = linear_layers(module)
    if PACKAGES[kind] == "torchao":
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

        config = Int8WeightOnlyConfig() if kind == "int8" else Float8WeightOnlyConfig()
        for layer in layers.values():
            quantize_(layer.to(device), config)
            layer.requires_grad_(False)
        return
    for name, layer in layers.items():
        parent, _, own = name.rpartition(".")
        setattr(module.get_submodule(parent), own, _packed(library, layer, kind, device))
    if kind == "nf4":  # what peft looks for
        module.is_loaded_in_4bit = True  # type: ignore[assignment]
    else:
        module.is_loaded_in_8bit = True  # type: ignore[assignment]


def _packed(library: Any, layer: nn.Linear, kind: Quantization, device: torch.device) -> nn.Module:
    """bitsandbytes' layer with the weights of a linear one."""
    size, bias, weight = (layer.in_features, layer.out_features), layer.bias is not None, layer.weight.data
    if kind == "nf4":
        made = library.nn.Linear4bit(*size, bias, weight.dtype, quant_type="nf4", device="meta")
        made.weight = library.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=False)
    else:
        made = library.nn.Linear8bitLt(*size, bias, has_fp16_weights=False, device="meta")
        made.weight = library.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    made.bias = layer.bias
    return made.to(device).requires_grad_(False).eval()  # type: ignore[no-any-return]
