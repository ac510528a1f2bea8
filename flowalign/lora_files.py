"""LoRA files as they are exchanged: read exactly, with the rank and alpha of every layer, and written for diffusers.

Read are safetensors in diffusers' layout (`transformer.MODULE.lora_A.weight`, with peft's settings in the header, or
`MODULE.alpha`, or neither: then the scale is 1, as diffusers takes it) and in peft's (`adapter_model.safetensors`
beside `adapter_config.json`). What is no pair of factors, such as DoRA's magnitudes, is refused: it does not add up.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import file_digest
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

WEIGHTS = "pytorch_lora_weights.safetensors"
PEFT_WEIGHTS, PEFT_CONFIG, PEFT_PREFIX = "adapter_model.safetensors", "adapter_config.json", "base_model.model."
METADATA = "lora_adapter_metadata"  # diffusers' name of the header's entry
NETWORKS = ("transformer", "unet", "controlnet")
CONTROLNET = "ControlNetModel"  # diffusers' class
UNET_BLOCKS = ("down_blocks.", "mid_block.", "up_blocks.")
PARTS = re.compile(r"(.+)\.(?:lora_([AB])\.weight|(alpha))$")


@dataclass(frozen=True)
class Factors:
    """What a LoRA adds to one weight, dW = scale * up down; of a convolution the kernel is down's."""

    down: Float[Tensor, "r i *kernel"]
    up: Float[Tensor, "o r *ones"]
    scale: float = 1.0

    @property
    def rank(self) -> int:
        """Columns of `up`."""
        return len(self.down)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of dW, which is that of the weight."""
        return (len(self.up), *self.down.shape[1:])

    def delta(self) -> Float[Tensor, "o i *kernel"]:
        """dW itself, in float64."""
        dense = self.scale * (self.up.double().flatten(1) @ self.down.double().flatten(1))
        return dense.reshape(self.shape)


@dataclass(frozen=True)
class LoRAFile:
    """A LoRA by "NETWORK.MODULE". digest: SHA-256 of the file. plain: it is in diffusers' layout."""

    path: Path
    digest: str
    factors: Mapping[str, Factors]
    plain: bool


def read_lora(path: str | Path) -> LoRAFile:
    """The LoRA of a file, of a folder that holds one, or of a run folder, whose kept policy it is.

    Raises: ValueError where there is none, for one that cannot be read exactly, and for numbers that are not finite.
    """
    file = find_lora(Path(path).expanduser())
    try:
        with safe_open(file, "pt") as opened:
            header = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # it is no mapping
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} cannot be read as safetensors: {error}") from error
    plain = not any(name.startswith(PEFT_PREFIX) for name in tensors)
    settings = _header(file, header) if plain else _beside(file)
    if not plain:
        tensors = {_with_network(name, settings): value for name, value in tensors.items()}
    with file.open("rb") as stream:
        digest = file_digest(stream, "sha256").hexdigest()
    return LoRAFile(file, digest, _factors(file, tensors, settings), plain)


def find_lora(path: Path) -> Path:
    """The file that `load_lora_weights` would read. Raises: ValueError where there is none, or which is not clear."""
    if not path.exists():
        raise ValueError(f"{path} does not exist; name a run folder, or a folder or file of LoRA weights")
    if path.is_file():
        return path
    folder = path / "lora" if (path / "config.yaml").is_file() else path
    for name in (WEIGHTS, PEFT_WEIGHTS):
        if (folder / name).is_file():
            return folder / name
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"{folder} holds several files ({', '.join(one.name for one in found)}); name one of them")
    pickled = next(folder.glob("*.bin"), None)
    why = f" ({pickled.name} is pickled, which is not read: save it as safetensors)" if pickled else ""
    raise ValueError(f"{folder} holds no LoRA weights, no file *.safetensors{why}")


def _with_network(name: str, settings: Mapping[str, Mapping[str, Any]] | None) -> str:
    """peft's names do not tell the network; its settings may, and only UNets and ControlNets have blocks so named."""
    module, told = name.removeprefix(PEFT_PREFIX), (settings or {}).get("controlnet", {}).get("auto_mapping") or {}
    unet = "controlnet" if told.get("base_model_class") == CONTROLNET else "unet"
    return f"{unet if module.startswith(UNET_BLOCKS) else 'transformer'}.{module}"


def _header(file: Path, header: Mapping[str, str]) -> dict[str, dict[str, Any]] | None:
    """peft's settings of each network, from a file's header; None without any."""
    if METADATA not in header:
        return None
    told = _json(f"{METADATA} in {file}", header[METADATA])
    own = {network: {k.removeprefix(f"{network}."): v for k, v in told.items()} for network in NETWORKS}
    return {network: value for network, value in own.items() if f"{network}.r" in told}


def _beside(file: Path) -> dict[str, dict[str, Any]]:
    config = file.with_name(PEFT_CONFIG)
    if not config.is_file():
        raise ValueError(f"{file} is in peft's layout and has no {PEFT_CONFIG} beside it, which tells its alpha")
    return dict.fromkeys(NETWORKS, _json(str(config), config.read_text()))


def _json(place: str, text: str) -> dict[str, Any]:
    try:
        told = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is not JSON: {error}") from error
    if not isinstance(told, dict):
        raise ValueError(f"{place} is no JSON object")
    return told


def _factors(
    file: Path, tensors: Mapping[str, Tensor], settings: Mapping[str, Mapping[str, Any]] | None
) -> dict[str, Factors]:
    if not tensors:
        raise ValueError(f"{file} holds no weights")
    parts: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        found = PARTS.fullmatch(name)
        if found is None or name.split(".")[0] not in NETWORKS:
            raise ValueError(_strange(file, name))
        if not value.isfinite().all():
            raise ValueError(f"{name} in {file} has numbers that are not finite")
        parts.setdefault(found[1], {})[found[2] or found[3]] = value
    return {module: _pair(file, module, held, settings) for module, held in sorted(parts.items())}


def _strange(file: Path, name: str) -> str:
    if name.startswith("text_encoder"):
        return f"{file} has a LoRA of a text encoder ({name}), which soups do not merge; save it without"
    return (
        f"{file} holds {name!r}, which is not a LoRA's NETWORK.MODULE.lora_A.weight or lora_B.weight with a network of "
        f"{' or '.join(NETWORKS)}; load it into its pipeline and write it with save_lora_weights"
    )


def _pair(
    file: Path, module: str, held: Mapping[str, Tensor], settings: Mapping[str, Mapping[str, Any]] | None
) -> Factors:
    if not {"A", "B"} <= held.keys():
        raise ValueError(f"{module} in {file} has only one of lora_A and lora_B")
    down, up = held["A"], held["B"]
    if min(down.ndim, up.ndim) < 2 or down.shape[0] != up.shape[1] or math.prod(up.shape[2:]) != 1:
        raise ValueError(
            f"{module} in {file}: lora_A is {[*down.shape]} and lora_B {[*up.shape]}, which are no factors"
        )
    network, _, name = module.partition(".")
    alpha = float(held["alpha"]) if "alpha" in held else None
    return Factors(down, up, _scale(file, name, len(down), alpha, None if settings is None else settings.get(network)))


def _scale(file: Path, module: str, rank: int, alpha: float | None, settings: Mapping[str, Any] | None) -> float:
    """alpha / rank, or with rsLoRA (arXiv:2312.03732) alpha / sqrt(rank), by the layer's own alpha where it has one."""
    from peft.utils.other import get_pattern_key  # seconds, which rewards alone need not wait for

    if settings is None:
        return 1.0 if alpha is None else alpha / rank
    for name in ("use_dora", "modules_to_save"):
        if settings.get(name):
            raise ValueError(f"{file} is made with {name}, which is no sum of products: it cannot be merged exactly")
    patterns = settings.get("alpha_pattern") or {}
    told = patterns.get(get_pattern_key([*patterns], module), settings.get("lora_alpha"))
    if not isinstance(told, int | float):
        raise ValueError(f"the settings of {file} give no lora_alpha for {module}")
    return float(told) / (rank**0.5 if settings.get("use_rslora") else rank)


def lora_bytes(factors: Mapping[str, Factors], notes: Mapping[str, str]) -> bytes:
    """A file that `load_lora_weights` reads, in float32, with every layer's alpha; equal LoRAs are equal bytes.

    Args:
        notes: further entries of the header.
    """
    tensors, told = dict[str, Tensor](), dict[str, Any]()
    for name, one in sorted(factors.items()):
        tensors[f"{name}.lora_A.weight"] = one.down.to(torch.float32).contiguous()
        tensors[f"{name}.lora_B.weight"] = one.up.to(torch.float32).contiguous()
    for network in NETWORKS:
        own = {name.removeprefix(f"{network}."): one for name, one in factors.items() if _of(name, network)}
        told |= {f"{network}.{key}": value for key, value in adapter_settings(own).items()} if own else {}
    header = {"format": "pt", METADATA: json.dumps(told, indent=2, sort_keys=True), **notes}
    return save(tensors, header)


def _of(name: str, network: str) -> bool:
    return name.startswith(f"{network}.")


def adapter_settings(factors: Mapping[str, Factors]) -> dict[str, Any]:
    """peft's settings of a network's layers by their names; alpha is a layer's scale times its rank."""
    ranks = {name: one.rank for name, one in factors.items()}
    alphas = {name: _whole(one.scale * one.rank) for name, one in factors.items()}
    (rank, others), (alpha, other_alphas) = _patterns(ranks), _patterns(alphas)
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": others,
        "alpha_pattern": other_alphas,
        "target_modules": sorted(ranks),
    }


def _whole(number: float) -> float:
    return int(number) if float(number).is_integer() else number


def _patterns(held: Mapping[str, float]) -> tuple[float, dict[str, float]]:
    """The commonest, and the others by pattern: one that starts with ^ is of the whole name and not of its end."""
    most = Counter(held.values()).most_common(1)[0][0]
    return most, {f"^{re.escape(name)}": own for name, own in sorted(held.items()) if own != most}
