"""Checkpoints on the disk: exact, without pickle, never half-written, and never believed when they are damaged."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from flowalign import checkpoint
from flowalign.distributed import LostProcess
from flowalign.tracking import Run
from tests import processes
from tests.interrupted import state_of
from tests.jobs import job
from trainers import Checkpoints
from trainers.keeper import Keeper

TREE = {
    "epoch": 3,
    "best": None,
    "nan": math.nan,
    "tenth": 0.1,
    "history": [{"held-out": 1 / 3}],
    "policy": {"layer.A": torch.randn(7, 5), "half": torch.randn(3).bfloat16(), "count": torch.tensor(4)},
    "empty": {},
    "none": torch.zeros(0, 3),
}
OWN = {"buffer": {3: torch.arange(4000.0)}}


def save(folder: Path, step: int, keep: int = 3, tree: Any = TREE, own: Any = OWN) -> Path:
    name = f"step-{step:08d}"
    kept = {f"step-{k:08d}" for k in range(step - keep + 1, step + 1)}
    return checkpoint.save(folder, name, tree, own, lambda path: None, lambda: kept)


def test_what_is_loaded_is_what_was_saved(tmp_path):
    path = save(tmp_path, 1)
    assert checkpoint.verify(path) is None
    shared, (own,) = checkpoint.load(path)
    assert math.isnan(shared.pop("nan"))
    wanted = {name: value for name, value in TREE.items() if name not in ("policy", "none", "nan")}
    assert {name: shared[name] for name in wanted} == wanted
    for name, value in TREE["policy"].items():
        assert shared["policy"][name].dtype == value.dtype
        assert torch.equal(shared["policy"][name], value)
    assert shared["none"].shape == (0, 3)
    assert torch.equal(own["buffer"]["3"], OWN["buffer"][3])


def test_nothing_is_pickled(tmp_path):
    names = {path.name for path in save(tmp_path, 1).rglob("*") if path.is_file()}
    assert names == {"manifest.json", "state.json", "state.safetensors", "process-0.json", "process-0.safetensors"}


def test_old_ones_go_and_those_asked_for_stay(tmp_path):
    for step in range(1, 6):
        save(tmp_path, step, keep=2)
    assert checkpoint.names(tmp_path) == ["step-00000004", "step-00000005"]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def cut(name: str, keep: float) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        content = (path / name).read_bytes()
        (path / name).write_bytes(content[: int(len(content) * keep)])

    return damage


def change(name: str, at: float, zeros: int = 0) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        content = bytearray((path / name).read_bytes())
        where = int(len(content) * at)
        if zeros:
            content[where:] = bytes(len(content) - where)
        else:
            content[where] ^= 1
        (path / name).write_bytes(bytes(content))

    return damage


def rewrite(key: str, value: Any) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        manifest = json.loads((path / "manifest.json").read_text())
        (path / "manifest.json").write_text(json.dumps(manifest | {key: value}))

    return damage


def forget(name: str) -> Callable[[Path], None]:
    """As if a file had never been there when the manifest was made."""

    def damage(path: Path) -> None:
        manifest = json.loads((path / "manifest.json").read_text())
        del manifest["files"][name]
        (path / "manifest.json").write_text(json.dumps(manifest))
        (path / name).unlink()

    return damage


CORRUPTIONS: dict[str, tuple[Callable[[Path], None], str]] = {
    "policy cut short": (cut("state.safetensors", 0.7), r"state.safetensors: \d+ bytes, the manifest says \d+"),
    "policy with one bit flipped": (change("state.safetensors", 0.9), "state.safetensors: its contents have changed"),
    "policy whose second half is zero": (change("state.safetensors", 0.5, 1), "state.safetensors: its contents have"),
    "policy missing": (lambda path: (path / "state.safetensors").unlink(), "state.safetensors: is missing"),
    "policy empty": (cut("state.safetensors", 0), "state.safetensors: 0 bytes"),
    "record cut short": (cut("state.json", 0.5), "state.json: "),
    "record with one digit changed": (change("state.json", 0.01), "state.json: its contents have changed"),
    "rollouts whose tail is zero": (change("process-0.safetensors", 0.95, 1), "process-0.safetensors: its contents"),
    "rollouts missing": (lambda path: (path / "process-0.json").unlink(), "process-0.json: is missing"),
    "manifest missing": (lambda path: (path / "manifest.json").unlink(), "manifest.json is missing"),
    "manifest cut short": (cut("manifest.json", 0.5), "manifest.json is cut short or altered"),
    "manifest without the policy": (rewrite("files", {}), "manifest.json is altered"),
    "manifest of another shape": (rewrite("files", [1, 2]), "manifest.json is cut short or altered"),
    "manifest of a deep nest": (
        lambda path: (path / "manifest.json").write_text("[" * 200_000),
        "manifest.json is cut short or altered",
    ),
    "rollouts never written": (forget("process-0.safetensors"), "process-0.safetensors: was not written"),
    "manifest of an older format": (rewrite("format", 0), "manifest.json is altered"),
}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_damaged_one_is_named_and_the_one_before_is_taken(name, tmp_path):
    damage, message = CORRUPTIONS[name]
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
    damage(bad)
    found, problems = checkpoint.newest(tmp_path)
    assert found == good
    (problem,) = problems
    assert problem.startswith(f"{bad}: ")
    assert pytest.importorskip("re").search(message, problem)


def test_one_of_a_newer_format_is_refused(tmp_path):
    save(tmp_path, 1)
    rewrite("format", 2)(save(tmp_path, 2))
    with pytest.raises(ValueError, match=r"has format 2, written by FlowAlign .*reads format 1: update"):
        checkpoint.newest(tmp_path)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has three more epochs to go."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    job(folder, epochs=2).train(report=False)
    return folder


@pytest.mark.parametrize("name", ["policy cut short", "manifest missing"])
def test_a_run_falls_back_and_says_so(name, stopped, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    kept = checkpoint.names(folder / "checkpoints")
    CORRUPTIONS[name][0](folder / "checkpoints" / kept[-1])
    job(folder, epochs=3).train(resume=True, report=False)
    told = capsys.readouterr().err
    assert f"flowalign: skipped {folder / 'checkpoints' / kept[-1]}: " in told
    assert f"flowalign: going on from {folder / 'checkpoints' / kept[-2]}" in told
    assert all(checkpoint.verify(path) is None for path in (folder / "checkpoints").iterdir())


def test_a_run_none_of_whose_checkpoints_can_be_read_is_not_started_anew(stopped, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    for path in (folder / "checkpoints").iterdir():
        (path / "state.json").unlink()
    before = (folder / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"no checkpoint in .* can be read"):
        job(folder, epochs=3).train(resume=True)
    assert (folder / "metrics.jsonl").read_bytes() == before


def endless(folder: Path) -> None:
    """Saves until it is killed; every checkpoint holds its own number in every tensor."""
    for step in range(1, 10_000):
        tree = {"step": step, "policy": {f"{i}": torch.full((2000,), float(step)) for i in range(8)}}
        save(folder, step, keep=2, tree=tree, own={"buffer": {0: torch.full((2000,), float(step))}})


def test_kills_while_saving_leave_a_good_one(tmp_path):
    rng = random.Random(0)
    lost = 0
    for turn in range(24):
        folder = tmp_path / str(turn % 4)

        def work(folder: Path = folder, after: float = rng.uniform(0.03, 0.15)) -> None:
            threading.Timer(after, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
            endless(folder)

        assert processes.killed(work) == -signal.SIGKILL
        found, problems = checkpoint.newest(folder)
        assert problems == [], "a kill leaves no broken one to be found"
        if found is None:
            lost += 1  # killed before the first was in place
            continue
        shared, (own,) = checkpoint.load(found)
        held = {*(float(v) for value in shared["policy"].values() for v in value), *map(float, own["buffer"]["0"])}
        assert held == {float(shared["step"])}
        checkpoint.sweep(folder)
    assert lost <= 4


def test_a_full_disk_leaves_the_last_one(tmp_path, monkeypatch):
    path = save(tmp_path, 1)
    free = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda folder: free._replace(free=100))
    with pytest.raises(OSError, match=r"no room for a checkpoint in .*the last one stands"):
        save(tmp_path, 2)
    assert checkpoint.newest(tmp_path) == (path, [])


def test_a_write_that_fails_leaves_the_last_one_and_no_rubbish(tmp_path, monkeypatch):
    path = save(tmp_path, 1)

    def full(tensors: Any, file: Any) -> None:
        Path(file).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 2)
    assert [one.name for one in tmp_path.iterdir()] == [path.name]
    assert checkpoint.newest(tmp_path) == (path, [])


def test_a_writer_that_fails_without_a_word_is_heard(tmp_path):
    """A MemoryError has no text; what the other process has written is no checkpoint."""

    def work(rank: int) -> str:
        if rank == 1:
            checkpoint.write_tensors = no_memory  # of this process alone: it is a fork
        try:
            save(tmp_path, 1)
        except (MemoryError, LostProcess) as error:
            return f"{type(error).__name__}: {error}"
        return "saved"

    assert processes.run(2, tmp_path, work) == ["LostProcess: process 1: MemoryError", "MemoryError: "]
    assert checkpoint.newest(tmp_path) == (None, [])


def no_memory(path: Path, tensors: Any) -> None:
    raise MemoryError


def test_a_policy_that_cannot_be_written_is_no_file_that_cannot_be_read(tmp_path, monkeypatch):
    """On a full disk safetensors raises an error of its own, which reading broken files raises too."""
    trainer = job(tmp_path / "run", epochs=1)

    def full(*words: Any, **told: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(trainer.model.pipeline, "save_lora_weights", full)
    with pytest.raises(OSError, match=r"lora cannot be written: .*No space left on device"):
        trainer.train(report=False)


def best_of(folder: Path) -> Path:
    """Its best checkpoint, whose policy has been damaged since."""
    state = state_of(folder)
    path = folder / "checkpoints" / state.best_checkpoint
    (weights,) = (path / "lora").glob("*.safetensors")
    change(f"lora/{weights.name}", 0.9)(path)
    return path


def test_a_damaged_best_policy_is_not_published(stopped, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    best, before = best_of(folder), digest_of(folder / "lora")
    assert best.name != checkpoint.names(folder / "checkpoints")[-1]
    job(folder, epochs=2).train(resume=True, report=False)  # which has nothing left to do
    told = capsys.readouterr().err
    assert f"flowalign: {best}: lora/" in told
    assert f"its contents have changed (SHA-256 differs); {folder / 'lora'} is not made of it" in told
    assert digest_of(folder / "lora") == before


def digest_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_damaged_best_checkpoint_is_not_rolled_back_to(stopped, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    best, trainer = best_of(folder), job(folder, epochs=3)
    trainer.state = state_of(folder)
    before = trainer.state.policy
    with pytest.raises(ValueError, match=f"{best} cannot be rolled back to: lora/.*its contents have changed"):
        Keeper(trainer, Run(folder, resume=True), None, Checkpoints()).roll_back()
    assert trainer.state.policy is before


@pytest.mark.skipif(shutil.which("mount") is None or os.geteuid() != 0, reason="a small disk needs root")
def test_a_really_full_disk_is_one_line(tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    if os.system(f"mount -t tmpfs -o size=300k tmpfs {folder} 2>/dev/null"):
        pytest.skip("no tmpfs can be mounted here")
    try:
        small = save(folder, 1, tree={"policy": {"a": torch.zeros(1000)}})
        with pytest.raises(OSError, match=r"No space left|no room"):
            save(folder, 2, tree={"policy": {"a": torch.zeros(200_000)}})
        assert checkpoint.newest(folder) == (small, [])
    finally:
        time.sleep(0.1)
        os.system(f"umount {folder}")


def test_changed_keys_are_found_at_any_depth():
    old = {"a": 1, "b": {"c": [1, 2], "d": {"e": 1}}, "gone": None}
    new = {"a": 1, "b": {"c": [1, 3], "d": {"e": 1, "new": 2}}, "gone": None}
    assert checkpoint.told_apart(old, new) == ["b.c", "b.d.new"]
