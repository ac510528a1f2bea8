"""A policy as others load it: a LoRA for diffusers or for kohya's tools, or a pipeline with the policy merged in."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from flowalign import checkpoint as checkpoints
from flowalign.config import ConfigError, load_yaml
from flowalign.config.paths import suggest
from flowalign.kohya import kohya_bytes, layout_of
from flowalign.lora_files import METADATA, PEFT_CONFIG, PEFT_WEIGHTS, WEIGHTS, Factors, LoRAFile, lora_bytes, read_lora
from flowalign.models import family_of
from flowalign.models.loading import EMBEDDED, load_pipeline, pipeline_class
from flowalign.publishing import NAMES, scrub
from flowalign.whole import CONFIG as NETWORK_CONFIG

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Policy:
    """What is exported.

    base: the pipeline it was trained on, a folder, hub id or embedded name. kind: its diffusers class. network: what
    the pipeline calls the network that it changes. lora: the LoRA; None for full fine-tuning, whose weights are in the
    folder `whole`. config, run: the run's, and its folder; None for a LoRA without a run. checkpoint: of the run, None
    for the policy that it keeps.
    """

    base: str
    kind: str
    network: str
    lora: LoRAFile | None
    whole: Path | None = None
    config: Mapping[str, Any] | None = None
    run: Path | None = None
    checkpoint: str | None = None

    @property
    def idle(self) -> bool:
        """Whether it is 0, as before training."""
        return self.lora is not None and not any(one.up.any() and one.down.any() for one in self.lora.factors.values())


@dataclass(frozen=True)
class Written:
    """What an export came to.

    files: their names. rounded: how far rounding to the dtype has moved the merged weights, over what the LoRA changes.
    """

    files: tuple[str, ...]
    rounded: float = 0.0


def find_policy(target: str, checkpoint: str | None = None, base: str | None = None) -> Policy:
    """The policy of a run folder, or a LoRA's folder or file.

    Args:
        checkpoint: the name of one of the run's, None for the policy that it keeps.
        base: the pipeline; None for the run's own.

    Raises: ValueError where there is none, and where the base model is not known.
    """
    run = Path(target).expanduser()
    if not (run / "config.yaml").is_file():
        if checkpoint is not None:
            raise ConfigError(f"--checkpoint is of a run folder, and {target} is none (it has no config.yaml)")
        lora = read_lora(target)
        if base is None:
            raise ConfigError(f"{target} is no run folder: name the LoRA's base model with --model")
        kind = pipeline_class(base)
        return Policy(base, kind, _network(lora, kind), lora)
    config = load_yaml(run / "config.yaml")
    model = config.get("model")
    named = base or (model.get("pipeline") if isinstance(model, dict) else None)
    if not isinstance(named, str):
        raise ConfigError(f"{run / 'config.yaml'} does not name the model's pipeline; name it with --model")
    place = run if checkpoint is None else _checkpoint(run, checkpoint)
    kind = pipeline_class(named)
    network = family_of(kind).network_name
    if (place / "lora").is_dir():
        return Policy(named, kind, network, read_lora(place / "lora"), None, config, run, checkpoint)
    if (place / network / NETWORK_CONFIG).is_file():
        return Policy(named, kind, network, None, place / network, config, run, checkpoint)
    raise ConfigError(
        f"{place} holds no policy, neither lora/ nor {network}/: a run keeps one from its first checkpoint on"
    )


def _checkpoint(run: Path, name: str) -> Path:
    there = checkpoints.names(run / "checkpoints")
    if name not in there:
        near = suggest(name, there, offer=2) or (f"; there are {', '.join(there)}" if there else "; it has none")
        raise ConfigError(f"{run} has no checkpoint {name!r}{near}")
    return run / "checkpoints" / name


def _network(lora: LoRAFile, kind: str) -> str:
    """The network that a policy of such a pipeline is on, and the LoRA as well."""
    wanted, names = family_of(kind).network_name, {name.partition(".")[0] for name in lora.factors}
    if names != {wanted}:
        told = " and ".join(sorted(names))
        raise ConfigError(f"{lora.path} is a LoRA of the {told}, and a policy of a {kind} is on its {wanted}")
    return wanted


def loads_loras(policy: Policy) -> bool:
    """Whether the pipeline itself loads LoRAs of this network: `load_lora_weights`; else peft does."""
    import diffusers
    from diffusers.loaders.lora_base import LoraBaseMixin

    kind = getattr(diffusers, policy.kind)
    return issubclass(kind, LoraBaseMixin) and policy.network in kind._lora_loadable_modules


def absent_parts(policy: Policy, written: Path | None = None) -> tuple[str, ...]:
    """Components that the pipeline lacks and that `from_pretrained` has to be told so, as SD3 without T5.

    Args:
        written: the folder of a merged pipeline; None for the base model's own, unless that is an embedded one.
    """
    import diffusers

    if written is None and policy.base in EMBEDDED:
        return ()
    index = diffusers.DiffusionPipeline.load_config(str(written or Path(policy.base).expanduser()))
    optional = getattr(diffusers, policy.kind)._optional_components
    return tuple(name for name, value in index.items() if value == [None, None] and name not in optional)


def _lora(policy: Policy, format: str) -> LoRAFile:
    if policy.lora is None:
        raise ConfigError(
            f"this policy is all of the {policy.network}'s weights and no LoRA: --format {format} is for LoRAs, take "
            "--format merged"
        )
    return policy.lora


def write_diffusers(policy: Policy, folder: Path) -> Written:
    """A file that `load_lora_weights(folder)` reads, rank and alpha in its header; else two that peft reads."""
    lora = _lora(policy, "diffusers")
    if loads_loras(policy):
        check_space(folder, lora.path.stat().st_size)
        (folder / WEIGHTS).write_bytes(_plain_bytes(lora))
        return Written((WEIGHTS,))
    if lora.plain:
        raise ConfigError(
            f"{lora.path} is in diffusers' layout, which {policy.kind} does not load for its {policy.network}; save it "
            "with peft, or take --format merged"
        )
    check_space(folder, lora.path.stat().st_size)
    shutil.copyfile(lora.path, folder / PEFT_WEIGHTS)
    shutil.copyfile(lora.path.with_name(PEFT_CONFIG), folder / PEFT_CONFIG)
    scrub(folder)
    return Written((PEFT_WEIGHTS, PEFT_CONFIG))


def _plain_bytes(lora: LoRAFile) -> bytes:
    """The file as it is, if its header holds the settings and nothing else; other notes may tell paths."""
    if lora.plain:
        with safe_open(lora.path, "pt") as opened:
            header = opened.metadata() or {}
        told = json.loads(header.get(METADATA, "{}"))
        named = [key for key, value in told.items() if value and key.endswith(NAMES)]
        if METADATA in header and header.keys() <= {"format", METADATA} and not named:
            return lora.path.read_bytes()
    return lora_bytes(lora.factors, {})


def write_kohya(policy: Policy, folder: Path, name: str, notes: Mapping[str, str], dtype: str | None) -> Written:
    """NAME.safetensors with the family's keys for kohya's trainers, ComfyUI and the like. See `flowalign.kohya`."""
    lora = _lora(policy, "kohya")
    content = kohya_bytes(layout_of(policy.kind), lora.factors, notes, DTYPES[dtype] if dtype else None)
    check_space(folder, len(content))
    (folder / f"{name}.safetensors").write_bytes(content)
    return Written((f"{name}.safetensors",))


def write_merged(policy: Policy, folder: Path, dtype: str | None, say: Callable[[str], None]) -> Written:
    """The whole pipeline with the policy in its weights, as `from_pretrained` reads it.

    W + alpha / r B A is added up in float64 and kept in float32, or rounded to the dtype once.

    Args:
        dtype: of all weights, fp32 by default. say: is told what takes long.
    """
    kept = DTYPES[dtype or "fp32"]
    say(f"loading {policy.base}")
    pipe = load_pipeline(
        policy.base, family_of(policy.kind).pipelines, {"default": kept, policy.network: torch.float32}
    )
    network: nn.Module = getattr(pipe, policy.network).float()
    if policy.lora is not None:
        rounded = merge_lora(network, policy.lora.factors, kept)
    else:
        rounded = 0.0
        trained: Any = type(network)
        network.load_state_dict(trained.from_pretrained(policy.whole).state_dict())
    parts = [one for one in pipe.components.values() if isinstance(one, nn.Module)]
    for part in parts:
        part.to(kept)
    size = sum(value.numel() * value.element_size() for part in parts for value in part.state_dict().values())
    check_space(folder, size)
    say(f"writing {gigabytes(size)}")
    pipe.save_pretrained(folder, safe_serialization=True)
    scrub(folder)
    return Written(tuple(sorted(one.name for one in folder.iterdir())), rounded)


@torch.no_grad()
def merge_lora(network: nn.Module, factors: Mapping[str, Factors], dtype: torch.dtype = torch.float32) -> float:
    """W <- W + dW for each layer, by "NETWORK.MODULE"; returns ||round(W + dW) - (W + dW)|| / ||dW|| of all.

    Args:
        dtype: what the weights will be rounded to; they stay in their own here.

    Raises: ValueError for a layer that the network does not have, or has in another size.
    """
    modules = dict(network.named_modules())
    lost = total = 0.0
    for name, one in factors.items():
        found: Any = modules.get(name.partition(".")[2])
        weight: Tensor | None = None if found is None else found.weight
        if weight is None or tuple(weight.shape) != one.shape:
            size = "does not have" if weight is None else f"has as {[*weight.shape]}, not {[*one.shape]}"
            raise ValueError(f"the LoRA changes {name}, which this {type(network).__name__} {size}: another base model")
        delta = one.delta()
        merged = weight.double() + delta
        weight.copy_(merged)
        lost += float((merged.to(dtype).double() - merged).square().sum())
        total += float(delta.square().sum())
    return (lost / total) ** 0.5 if total else 0.0


def check_space(folder: Path, size: int) -> None:
    """Raises: ValueError where so many bytes do not fit on the disk."""
    free = shutil.disk_usage(folder).free
    if size > free:
        raise ValueError(
            f"the export takes {gigabytes(size)} and the disk of {folder.parent} has {gigabytes(free)} free"
        )


def gigabytes(size: float) -> str:
    """Bytes in the unit that suits them."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.2g} MB"
