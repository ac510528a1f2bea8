"""What tells networks and tokenizers from any others: for caches of what they have made."""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from flowalign.distributed import rank

CODE = 1  # raise it where the same text would get another embedding
MUCH = 4e9  # bytes of weights; reading them takes some seconds
# what turns texts to tokens and tokens to embeddings, beside the weights
PACKAGES = ("torch", "transformers", "diffusers", "tokenizers", "sentencepiece", "ftfy", "beautifulsoup4")
LAST_CALL = ("truncation", "padding")  # of tokenizer.json: as the tokenizer was called last
WHENCE = ("name_or_path", "is_local", "local_files_only")  # of tokenizer_config.json: where it was found


@runtime_checkable
class Digest(Protocol):
    """One of hashlib's."""

    def update(self, data: Any, /) -> None: ...


def add_tensor(digest: Digest, name: str, value: Tensor) -> None:
    """A tensor's name, dtype, shape and bytes; of a quantised one, those of the tensors that it is packed in."""
    value = value.detach()
    if is_traceable_wrapper_subclass(value):
        for inner in value.__tensor_flatten__()[0]:
            add_tensor(digest, f"{name}.{inner}", getattr(value, inner))
        return
    digest.update(f"{name} {value.dtype} {[*value.shape]}".encode())
    digest.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def add_weights(digest: Digest, module: nn.Module) -> None:
    """All of a module's weights, in the order of their names."""
    for name, value in sorted(module.state_dict().items()):
        add_tensor(digest, name, value)


def of_module(module: nn.Module) -> str:
    """Tells a network by its class, config, attention and weights; a line says so where that takes a while."""
    size = sum(value.nbytes for value in module.state_dict().values())
    if size > MUCH and rank() == 0:
        print(f"flowalign: reading {size / 1e9:.0f} GB of {type(module).__name__} once, for the fingerprint of what "
              "it makes", file=sys.stderr, flush=True)  # fmt: skip
    digest = hashlib.sha256(f"{type(module).__name__} {config_of(module)}".encode())
    add_weights(digest, module)
    return digest.hexdigest()


def config_of(module: nn.Module) -> str:
    """A network's config but for where it came from; "" where it has none."""
    config = getattr(module, "config", None)
    attention = config._attn_implementation if isinstance(config, PreTrainedConfig) else ""
    known = config.to_dict() if isinstance(config, PreTrainedConfig) else dict(config or {})
    told = {name: value for name, value in known.items() if not name.startswith("_")}
    return f"{json.dumps(told, sort_keys=True, default=str)} {attention}" if told else ""


def of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Tells a tokenizer by the files that it would be saved as, but for how it was called last and found."""
    digest = hashlib.sha256(type(tokenizer).__name__.encode())
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for path in sorted(file for file in Path(folder).rglob("*") if file.is_file()):
            digest.update(f"{path.name} ".encode())
            digest.update(_without(path, {"tokenizer.json": LAST_CALL, "tokenizer_config.json": WHENCE}))
    return digest.hexdigest()


def _without(path: Path, dropped: Mapping[str, tuple[str, ...]]) -> bytes:
    """A file's content, of some JSON files without some keys."""
    if path.name not in dropped:
        return path.read_bytes()
    told = json.loads(path.read_bytes())
    return json.dumps({name: told[name] for name in sorted(told) if name not in dropped[path.name]}).encode()


def text_facts(pipeline: Any) -> dict[str, Any]:
    """What a pipeline's embeddings of texts depend on: its class, text encoders and tokenizers, and their packages."""
    parts = {name: part for name, part in pipeline.components.items() if part is not None}
    return {
        "code": CODE,
        "pipeline": type(pipeline).__name__,
        "encoders": {name: of_module(part) for name, part in parts.items() if name.startswith("text_encoder")},
        "tokenizers": {name: of_tokenizer(part) for name, part in parts.items() if name.startswith("tokenizer")},
        "versions": versions(),
    }


def versions() -> dict[str, str | None]:
    """Of the `PACKAGES`; None for one that is not installed."""
    return {name: _version(name) for name in PACKAGES}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
