"""Hosts whose wall clocks are wrong, or set amid a run: nothing is decided by them, and no line counts by them."""

from __future__ import annotations

import ast
import functools
import time
from pathlib import Path
from typing import Any

import pytest

from flowalign import distributed, doctor, watchdog
from flowalign.accounting import Meter
from tests import processes
from tests.interrupted import train
from tests.jobs import digest
from tests.test_imports import FILES, ROOT

APART = (5 * 3600.0, -7200.0)  # seconds that two hosts' clocks are off by
WALL = ("time.time", "time.time_ns", "datetime.now", "datetime.utcnow", "datetime.today", "date.today")
TOLD = {"flowalign/doctor.py"}  # how far clocks are apart


def wrong(rank: int) -> None:
    """Have this process's wall clock be off, and go on in jumps, back too."""
    real, calls = time.time, [0]

    def read() -> float:
        calls[0] += 1
        return real() + APART[rank] + (600 if calls[0] % 2 else -600)

    time.time = read


def ages(rank: int) -> list[float]:
    """For how long the other process is noted to have been where it is, before and after half a second there."""
    wrong(rank)
    watch, found = watchdog._Here.present, list[float]()
    assert watch is not None
    with Meter().phase("reward"):
        for seconds in (0.0, 0.5):
            time.sleep(seconds)
            distributed.largest([0.0])
            found += [note.age for note in watch.notes() or []]
            distributed.largest([0.0])
    return found


def test_others_are_said_to_have_been_somewhere_for_true_seconds(tmp_path):
    began = time.monotonic()
    found = processes.run(2, tmp_path, ages)
    spent = time.monotonic() - began
    assert all(len(one) == 2 for one in found)
    assert all(0 <= age <= spent for one in found for age in one)


def skewed(folder: Path, rank: int) -> None:
    wrong(rank)
    train(folder)


def test_a_run_on_hosts_of_other_times_comes_to_the_same(tmp_path, unbroken):
    processes.run(2, tmp_path, functools.partial(skewed, tmp_path / "run"))
    assert digest(tmp_path / "run") == unbroken(2)


def looked(folder: Path, apart: bool, rank: int) -> Any:
    if apart:
        real = time.time
        time.time = lambda: real() + APART[rank]
    return doctor.collectives(folder).findings


@pytest.mark.parametrize("apart", [False, True])
def test_a_report_tells_that_clocks_are_apart(apart, tmp_path):
    first, second = processes.run(2, tmp_path, functools.partial(looked, tmp_path, apart))
    said = [line for line in first if "clocks" in line]
    assert said == [line for line in second if "clocks" in line]
    assert len(said) == apart
    assert all(line.startswith("the hosts' clocks are 2520") and line.endswith("cannot be compared") for line in said)


def test_the_wall_clock_is_read_to_be_told_alone():
    found = set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(WALL):
                found.add(path.relative_to(ROOT).as_posix())
    assert found == TOLD
