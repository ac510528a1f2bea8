"""Checkpoints: JSON and safetensors, hashed, fsynced and renamed into place, so that a kill leaves the old or the new.

    step-00000123/manifest.json       format, processes, versions, and the size and SHA-256 of every file
                  state.json, state.safetensors            what all processes share
                  process-0.json, process-0.safetensors    what each holds alone (the rollouts of an unfinished epoch)
                  shards-0.json, shards-0.safetensors      each one's rows of what is shared in shards
                  lora/                                    the policy as the plain pipeline loads it

Nothing is pickled. A file is believed when its hash agrees: safetensors itself reads a file whose second half is zero.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from hashlib import file_digest
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from flowalign import __version__, shards
from flowalign.distributed import on_main, rank, together, world_size
from flowalign.user_errors import written_to

FORMAT = 1
MANIFEST = "manifest.json"
SPARE = 1.1  # of the last checkpoint's size, that must be free on the disk

Tree = Any  # nested mappings, lists and dataclasses of numbers, texts, None and tensors


def pack(tree: Tree) -> tuple[Any, dict[str, Tensor]]:
    """Plain data with a name in the place of each tensor, and the tensors by name."""
    tensors: dict[str, Tensor] = {}
    known: set[int] = set()

    def walk(value: Tree, at: str) -> Any:
        if isinstance(value, Tensor):
            flat = value.detach().cpu().contiguous()
            place = flat.untyped_storage().data_ptr()
            tensors[at] = flat.clone() if place in known else flat  # safetensors refuses shared memory
            known.add(place)
            return {"$tensor": at}
        if is_dataclass(value):
            return walk({f.name: getattr(value, f.name) for f in fields(value)}, at)
        if isinstance(value, Mapping):
            return {str(name): walk(element, f"{at}/{name}") for name, element in value.items()}
        if isinstance(value, list | tuple):
            return [walk(element, f"{at}/{i}") for i, element in enumerate(value)]
        return value

    return walk(tree, ""), tensors


def unpack(data: Any, tensors: Mapping[str, Tensor]) -> Tree:
    """The tree that was packed; dataclasses come back as mappings, tuples as lists, and keys as texts."""
    if isinstance(data, dict):
        if data.keys() == {"$tensor"}:
            return tensors[data["$tensor"]]
        return {name: unpack(value, tensors) for name, value in data.items()}
    return [unpack(value, tensors) for value in data] if isinstance(data, list) else data


def save(
    folder: Path,
    name: str,
    shared: Tree,
    own: Tree,
    extra: Callable[[Path], None],
    keep: Callable[[], set[str]],
    anew: bool = False,
) -> Path:
    """Write the checkpoint `name` into the folder, together with all processes; returns its path.

    Args:
        shared: what is the same on every process. own: what only this one has; empty for nothing.
        extra: writes further files into a folder, on the first process.
        keep: the names that stay, asked for once the new one is in place; all others go.
        anew: whether a good one of this name, if any, is of another state, and has to go.

    Raises: OSError on every process where one cannot write; what was there before is untouched then.
    """
    making, path = folder / f".making-{name}", folder / name
    shared, held = shards.taken_out(shared)

    def finish() -> None:
        _write(making, shared, "state")
        extra(making)
        _seal(making)
        if path.exists() and (anew or verify(path) is not None):
            _discard(path)
        if not path.exists():  # else it has the same state: a name is one place in a run
            making.rename(path)
        _sync_folder(folder)
        retire(folder, keep())

    try:
        on_main(lambda: _begin(folder, making))
        together(lambda: _write_own(making, own, held))
        on_main(finish)
    finally:
        if rank() == 0:
            sweep(folder)
    return path


def retire(folder: Path, keep: set[str]) -> None:
    """Remove all checkpoints but those named, each renamed first so that a kill leaves no half of it to be found."""
    for name in names(folder):
        if name not in keep:
            _discard(folder / name)


def names(folder: Path) -> list[str]:
    """The checkpoints there, oldest first, good or not."""
    return sorted(path.name for path in folder.glob("step-*") if path.is_dir())


def sweep(folder: Path) -> None:
    """Remove what a kill has left half-written or half-removed."""
    for path in folder.glob(".making-*"):
        shutil.rmtree(path)
    for path in folder.glob(".gone-*"):
        shutil.rmtree(path)


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, or None, and why each newer one does not.

    Raises: ValueError for a checkpoint that a newer FlowAlign wrote.
    """
    problems: list[str] = []
    for name in reversed(names(folder)):
        problem = verify(folder / name)
        if problem is None:
            return folder / name, problems
        problems.append(f"{folder / name}: {problem}")
    return None, problems


def verify(path: Path, within: str = "") -> str | None:
    """What is wrong with a checkpoint, or with one folder in it; None if nothing.

    Raises: ValueError for one that a newer FlowAlign wrote.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        written, files = manifest["format"], dict(manifest["files"])
        if isinstance(written, int) and written > FORMAT:
            raise NewerFormat(
                f"{path} has format {written}, written by FlowAlign {manifest.get('flowalign')}; this is "
                f"{__version__}, which reads format {FORMAT}: update flowalign-diffusion, or move the folder away"
            )
        if written != FORMAT or "state.json" not in files or "state.safetensors" not in files:
            return f"{MANIFEST} is altered"
        stems = {name.rpartition(".")[0] for name in files if "/" not in name}
        lacking = {f"{stem}.{kind}" for stem in stems for kind in ("json", "safetensors")} - files.keys()
        if lacking:
            return f"{min(lacking)}: was not written"
        for name, known in sorted(files.items()):
            if not name.startswith(f"{within}/" if within else ""):
                continue
            problem = _compare(path / name, known["bytes"], known["sha256"])
            if problem is not None:
                return f"{name}: {problem}"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, NewerFormat):
            raise
        return f"{MANIFEST} is cut short or altered"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None


class NewerFormat(ValueError):
    """A checkpoint that a newer FlowAlign wrote."""


def _compare(path: Path, size: int, digest: str) -> str | None:
    if not path.is_file():
        return "is missing"
    if path.stat().st_size != size:
        return f"{path.stat().st_size} bytes, the manifest says {size}"
    if _digest(path) != digest:
        return "its contents have changed (SHA-256 differs)"
    return None


def load(path: Path) -> tuple[Tree, list[Tree]]:
    """What all processes share, and what each of those that wrote it held; call `verify` first."""
    own = sorted(path.glob("process-*.json"))
    return shards.put_back(_read(path / "state"), path), [_read(one.with_suffix("")) for one in own]


def _read(stem: Path) -> Tree:
    try:
        return unpack(json.loads(stem.with_suffix(".json").read_bytes()), load_file(stem.with_suffix(".safetensors")))
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{stem}.json and .safetensors are none of FlowAlign's, though their hashes agree: {error}"
        ) from error


def _begin(folder: Path, making: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder)
    there = names(folder)
    if there:
        size = sum(file.stat().st_size for file in (folder / there[-1]).rglob("*") if file.is_file())
        free = shutil.disk_usage(folder).free
        if free < SPARE * size:
            raise OSError(
                f"no room for a checkpoint in {folder}: {free / 1e6:.0f} MB are free and the last one has "
                f"{size / 1e6:.0f} MB; the last one stands: make room and run the same command again"
            )
    making.mkdir()


def _write(folder: Path, tree: Tree, name: str) -> None:
    data, tensors = pack(tree)
    (folder / f"{name}.json").write_text(json.dumps(data))
    write_tensors(folder / f"{name}.safetensors", tensors)


def _write_own(folder: Path, own: Tree, held: Mapping[str, tuple[Tensor, int]]) -> None:
    """What this process holds alone, and its rows of what is in shards."""
    if own:
        _write(folder, own, f"process-{rank()}")
    if held:
        (folder / f"shards-{rank()}.json").write_text(shards.index_of(held))
        write_tensors(folder / f"shards-{rank()}.safetensors", {name: rows for name, (rows, _) in held.items()})


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """A safetensors file. Raises: OSError"""
    with written_to(path):
        save_file(tensors, path)


def _seal(making: Path) -> None:
    """Bring every file to the disk, and their sizes and hashes into the manifest."""
    files = {}
    for file in _files(making):
        _sync(file)
        files[str(file.relative_to(making))] = {"bytes": file.stat().st_size, "sha256": _digest(file)}
    facts = {"format": FORMAT, "flowalign": __version__, "processes": world_size(), "files": files}
    (making / MANIFEST).write_text(json.dumps(facts, indent=1))
    _sync(making / MANIFEST)
    for folder in {file.parent for file in _files(making)}:
        _sync_folder(folder)


def _files(folder: Path) -> Iterator[Path]:
    yield from sorted(path for path in folder.rglob("*") if path.is_file())


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def _discard(path: Path) -> None:
    gone = path.with_name(f".gone-{path.name}")
    path.rename(gone)
    shutil.rmtree(gone)


def _sync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def told_apart(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Sequence[str]:
    """The dotted keys at which two nested mappings differ."""
    changed: list[str] = []
    for name in [*old, *(name for name in new if name not in old)]:
        one, other = old.get(name), new.get(name)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            changed += told_apart(one, other, f"{prefix}{name}.")
        elif one != other:
            changed.append(f"{prefix}{name}")
    return changed
