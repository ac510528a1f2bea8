"""Runs that are stopped and gone on with: each kind of trainer, on one to four processes, at a boundary and between."""

from __future__ import annotations

import functools
import signal
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from flowalign import checkpoint
from flowalign.interrupt import Stopped
from tests import processes
from tests.interrupted import dying, train
from tests.jobs import BY_GRADIENT, digest
from tests.test_resampling import CHANGES
from tests.test_sharding import LINE, SMALL, assert_resumed
from trainers.state import State

WORLDS = (1, 2, 3, 4)
STORED = ("pairs",)  # nothing is rolled out
STEPS = ("dpo", "pairs", "rwr", "raft", "nft", "awm")  # of the forward process
# what the trainer of `tests.test_resume` has no use for: a run that has, and where it is stopped
FIELDS: dict[str, tuple[dict[str, Any], tuple[str, int]]] = {
    "older": ({"kind": "nft"}, ("forward step", 5)),
    "noise": ({"kind": "dense_grpo"}, ("update", 5)),
    "rounds": (CHANGES, ("rollout", 15)),
    "kl_coef": (CHANGES, ("rollout", 15)),
}


def moments(kind: str) -> dict[str, tuple[str, int]]:
    """Where one process is asked to stop, and as it comes there for the n-th time: after an optimizer step, and amid
    an epoch's rollouts or, where none are kept, amid an optimizer step."""
    if kind in BY_GRADIENT:
        return {"boundary": ("step", 3), "between": ("path", 2)}
    if kind in STEPS:
        return {"boundary": ("forward step", 3), "between": ("forward" if kind in STORED else "rollout", 2)}
    return {"boundary": ("update", 2), "between": ("rollout", 2)}


def stopped(folder: Path, rank: int, **changes: Any) -> str:
    """What the run says once it has been asked to stop, with its newest checkpoint; nothing where it has ended."""
    try:
        train(folder, **changes)
    except Stopped as stop:
        return str(stop)
    return ""


def unbroken(kind: str, world: int) -> dict[str, Any]:
    """What a run comes to that nothing happens to; and again, in fresh processes."""
    found = []
    for _ in range(2):
        with TemporaryDirectory(prefix="flowalign-resumes-") as held:
            processes.run(world, Path(held), functools.partial(train, Path(held) / "run", kind=kind))
            found.append(digest(Path(held) / "run"))
    return {"digest": found[0], "repeats": found[0] == found[1]}


def resumed(kind: str, world: int, moment: str, whole: dict[str, str]) -> dict[str, Any]:
    """Whether a run that was stopped at a moment comes to the same as one that was not."""
    with TemporaryDirectory(prefix="flowalign-resumes-") as held:
        folder = Path(held) / "run"
        place, turn = moments(kind)[moment]
        last = world - 1  # of a few micro-batches the first processes may have none
        work = dying(functools.partial(stopped, folder, kind=kind), place, turn, last, signal.SIGTERM)
        told = processes.run(world, Path(held), work)
        if not all("stopped by SIGTERM" in one for one in told):
            return {"equal": False, "differs": ["it did not stop"], "saved": ""}
        saved = told[0].partition("all is saved in ")[2].partition(";")[0].rpartition("/")[2]
        processes.run(world, Path(held), functools.partial(train, folder, kind=kind))
        found = digest(folder)
    differs = [name for name, value in whole.items() if found.get(name) != value]
    return {"equal": not differs, "differs": differs, "saved": saved}


def resumed_in_four_shards() -> dict[str, Any]:
    """Full fine-tuning in four shards, stopped amid an optimizer step. Raises: AssertionError where bits differ."""
    with TemporaryDirectory(prefix="flowalign-resumes-") as held:
        assert_resumed(4, LINE, Path(held), ("update", 2), **SMALL)
    return {"equal": True}


def left_out(name: str) -> dict[str, Any]:
    """Whether a run that is gone on with without a field of its record comes to something else."""
    changes, where = FIELDS[name]
    found = []
    with TemporaryDirectory(prefix="flowalign-resumes-") as held:
        for dropped in ("", name):
            folder = Path(held) / f"run-{dropped}"
            work = dying(functools.partial(stopped, folder, **changes), *where, 0, signal.SIGTERM)
            (told,) = processes.run(1, Path(held), work)
            if not told:
                raise RuntimeError(f"the run that {name} is left out of did not stop at {where}")
            found += processes.run(1, Path(held), functools.partial(without, folder, dropped, **changes))
    return {"differs": found[0] != found[1], "what": found[1].get("error", "digest")}


def without(folder: Path, name: str, rank: int, **changes: Any) -> dict[str, str]:
    """The digest of a run that goes on with one field as new, or what it fails with."""
    real = checkpoint.load

    def load(path: Path) -> tuple[Any, list[Any]]:
        shared, own = real(path)
        return shared | ({name: getattr(State(), name)} if name else {}), own

    checkpoint.load = load
    try:
        train(folder, **changes)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return digest(folder)
