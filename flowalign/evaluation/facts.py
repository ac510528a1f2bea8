"""What tells a model, a reward or a method from any other: the keys of what has been drawn and scored.

A parsed config becomes plain data: every argument with its default, the source of classes by its hash, and beside every
name of a file, a folder or a repository of the hub what is in it. Where such a thing lies is no part of it, so that a
sweep goes on in a folder that was moved.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import file_digest, sha256
from pathlib import Path
from types import FunctionType
from typing import Any

from flowalign.config import PACKAGES, Call, Recipe, locate, parse
from flowalign.config.hints import Name
from flowalign.lora_files import PEFT_CONFIG, find_lora
from flowalign.models.loading import EMBEDDED, pipeline_class
from flowalign.shapes import VIDEO_WEIGHTS, WEIGHTS
from flowalign.tracking import write_atomically
from rewards.base import as_reward
from rewards.expression import REWARDS

# arguments of models that change no picture: where embeddings are kept, and how much of them
FREE = ("embeddings", "embeddings_gb", "gradient_checkpointing")
HUB = re.compile(r"[\w.-]+/[\w.-]+")
LARGE = 2e9  # bytes of files that take a while to read
IGNORED = (".lock", ".cache", ".git")


@dataclass
class Digests:
    """SHA-256 of files, each read once while it stays as it is; `file` keeps them from run to run."""

    file: Path
    known: dict[str, list[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        try:
            self.known = dict(json.loads(self.file.read_bytes()))
        except (OSError, ValueError):
            self.known = {}  # nothing is lost but the time to read them again

    def of(self, path: Path) -> str:
        """Of a file, or of all files of a folder with their names."""
        if path.is_file():
            return self._file(path)
        inside = sorted(one for one in path.rglob("*") if one.is_file() and not {*one.parts} & {*IGNORED})
        new = sum(one.stat().st_size for one in inside if not self._has(one))
        if new > LARGE:
            print(
                f"flowalign: reading {new / 1e9:.0f} GB of {path} once, to know it again", file=sys.stderr, flush=True
            )
        return sha256("".join(f"{one.relative_to(path)} {self._file(one)}\n" for one in inside).encode()).hexdigest()

    def _has(self, path: Path) -> bool:
        told = path.stat()
        return self.known.get(str(path.resolve()), [])[:2] == [told.st_size, told.st_mtime_ns]

    def _file(self, path: Path) -> str:
        if not self._has(path):
            told = path.stat()
            with path.open("rb") as stream:
                digest = file_digest(stream, "sha256").hexdigest()
            self.known[str(path.resolve())] = [told.st_size, told.st_mtime_ns, digest]
        return str(self.known[str(path.resolve())][2])

    def save(self) -> None:
        """Write what is known."""
        write_atomically(self.file, json.dumps(self.known).encode())

    def lora(self, path: str) -> str:
        """Of the weights alone, with what peft has beside them: a copy of them is the same LoRA."""
        found = Path(path).expanduser()
        try:
            file = find_lora(found)
        except ValueError:
            return self.of(found)  # all of a network's weights, or what the adapter will refuse
        beside = file.with_name(PEFT_CONFIG)
        return self.of(file) + (self.of(beside) if beside.is_file() else "")


def key_of(facts: Any) -> str:
    """A short name for plain data: equal data have equal ones."""
    return sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:24]


def model_facts(call: Call, digests: Digests) -> dict[str, Any]:
    """Of a model's parsed config."""
    pipeline = call.arguments.get("pipeline")
    if isinstance(pipeline, str) and HUB.fullmatch(pipeline) and hub_revision(pipeline) is None:
        pipeline_class(pipeline)  # which fetches the index, and with it the number of the commit
    told = facts(Call(call.path, call.target, *map(_without, (call.arguments, call.defaults))), digests)
    lora = call.arguments.get("lora")
    start = lora.arguments.get("start") if isinstance(lora, Call) else None
    if isinstance(start, str):
        told = {**told, "arguments": {**told["arguments"], "lora": {"digest": digests.lora(start)}}}
    return dict(told)


def _without(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if name not in FREE}


def reward_facts(config: Any, allow_code: bool, digests: Digests) -> Any:
    """Of a reward's config: a mapping, a dotted path, or a formula of rewards."""
    told = parse(as_reward, {"reward": config}, allow_code).arguments["reward"]
    if not isinstance(told, str):
        return facts(told, digests)
    named = sorted({name for name in re.findall(r"[A-Za-z_][\w.]*", told) if name in REWARDS})
    return {"formula": told, "rewards": {name: _made(locate(REWARDS[name]), digests) for name in named}}


def _made(target: Any, digests: Digests) -> Any:
    return facts(parse(target, {}), digests)


def facts(tree: Any, digests: Digests) -> Any:
    """A parsed config as plain data that says what it is made of."""
    if isinstance(tree, Call):
        defaults = {name: _default(value, digests) for name, value in tree.defaults.items()}
        given = {name: facts(value, digests) for name, value in tree.arguments.items()}
        return {"class": tree.path, "source": source(tree.target), "arguments": {**defaults, **given}}
    if isinstance(tree, Name):
        return {"name": tree.path, "source": source(tree.target)}
    if isinstance(tree, Recipe):
        return facts(tree.config, digests)
    if isinstance(tree, Mapping):
        return {str(name): facts(value, digests) for name, value in tree.items()}
    if isinstance(tree, str | Path):
        return content(str(tree), digests)
    if isinstance(tree, Sequence):
        return [facts(value, digests) for value in tree]
    return tree


def _default(value: Any, digests: Digests) -> Any:
    """A default: a name may be of a model, anything else is told by how it is printed, or not at all."""
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return content(value, digests)
    told = repr(value)
    return None if " at 0x" in told else told


def content(text: str, digests: Digests) -> Any:
    """A text, with what it names, if it names something."""
    if text in EMBEDDED:
        return {"embedded": text, "content": digests.of(VIDEO_WEIGHTS if "video" in text else WEIGHTS)}
    path = Path(text).expanduser()
    if text and ("/" in text or path.suffix) and len(text) < 250 and path.exists():
        return {"content": digests.of(path)}
    revision = hub_revision(text) if HUB.fullmatch(text) else None
    return text if revision is None else {"hub": text, "revision": revision}


def hub_revision(name: str) -> str | None:
    """Which commit of a repository is in the hub's cache on this machine; None where none is."""
    from huggingface_hub.constants import HF_HUB_CACHE

    ref = Path(HF_HUB_CACHE) / f"models--{name.replace('/', '--')}" / "refs" / "main"
    try:
        return ref.read_text().strip()
    except OSError:
        return None


@lru_cache(maxsize=512)
def source(target: Any) -> str:
    """The hash of the files that a reward, or what the user has written, stands in; "" for anything else."""
    kinds = target.__mro__ if isinstance(target, type) else (target,)
    owned = [one for one in kinds if isinstance(one, type | FunctionType) and _is_own(one)]
    files = sorted({inspect.getsourcefile(one) or "" for one in owned} - {""})
    return sha256(b"".join(Path(file).read_bytes() for file in files)).hexdigest()[:16] if files else ""


def _is_own(one: Any) -> bool:
    """Whether it is a reward of ours, or the user's, and not of an installed library.

    Models and searches of ours are told by the version of the sampler (`cells.SAMPLER`), so that not every release
    draws all pictures again.
    """
    package = one.__module__.split(".")[0]
    if package in PACKAGES:
        return bool(package == "rewards")
    file = str(getattr(sys.modules.get(one.__module__), "__file__", None) or "")
    return bool(file) and "site-packages" not in file and "/lib/python" not in file
