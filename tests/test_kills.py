"""A run that is killed, alone or beside others, and gone on with by the same command: the same to the last bit."""

from __future__ import annotations

import functools
import signal

import pytest

from tests import processes
from tests.interrupted import dying, slow_but, train
from tests.jobs import BY_GRADIENT, digest

KILLS = [
    ("rollout", 1), ("rollout", 6), ("reward", 14), ("update", 3), ("update", 20),
    ("write", 2), ("write", 7), ("seal", 3), ("rename", 5), ("retire", 2),
]  # fmt: skip
GRADIENT_KILLS = [("path", 1), ("path", 7), ("step", 3), ("reward", 9), ("seal", 3)]
ALL_KILLS = [
    *(("flow_grpo", *kill) for kill in KILLS),
    *(("dense_grpo", *kill) for kill in [("rollout", 3), ("rollout", 10), ("reward", 9), ("update", 15), ("seal", 3)]),
    ("tree", "update", 11), ("euphonium", "rollout", 6), ("guard", "update", 9),
    *(("draft", *kill) for kill in GRADIENT_KILLS),
    *(("refl", *kill) for kill in GRADIENT_KILLS[1:3]),
    *((kind, *GRADIENT_KILLS[1]) for kind in BY_GRADIENT[2:]),
    *(("dpo", *kill) for kill in [("rollout", 9), ("forward", 3), ("forward", 10), ("forward step", 6), ("seal", 6)]),
    ("g2rpo", "update", 9), ("awm", "forward", 12),
    *(("pairs", *kill) for kill in [("forward", 2), ("forward step", 3), ("seal", 3)]),
]  # fmt: skip


FAST = [
    *(("flow_grpo", *kill) for kill in (KILLS[1], KILLS[4], KILLS[8])), ("draft", "path", 7), ("dpo", "forward", 10),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "place", "turn"), slow_but(FAST, ALL_KILLS))
def test_a_killed_run_comes_to_the_same(kind, place, turn, tmp_path, unbroken):
    work = functools.partial(train, tmp_path / "run", kind=kind)
    assert processes.killed(dying(work, place, turn, 0, signal.SIGKILL)) == -signal.SIGKILL
    assert processes.killed(work) == 0
    assert digest(tmp_path / "run") == unbroken(1, kind)


TWO = [
    ("flow_grpo", "rollout", 3, 0), ("flow_grpo", "reward", 3, 1), ("flow_grpo", "update", 8, 1),
    ("flow_grpo", "write", 2, 1), ("flow_grpo", "seal", 4, 0), ("dense_grpo", "update", 7, 1),
    ("tree", "update", 5, 1), ("draft", "path", 3, 1), ("refl", "step", 2, 0), ("instruct_video", "path", 3, 0),
    ("dpo", "forward", 6, 1), ("pairs", "forward step", 4, 0),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "place", "turn", "victim"), slow_but([TWO[1], TWO[3], TWO[10]], TWO))
def test_one_of_two_processes_is_killed(kind, place, turn, victim, tmp_path, unbroken):
    work = functools.partial(train, tmp_path / "run", kind=kind)
    with pytest.raises(RuntimeError, match=r"process(es)? .* (has|have) gone"):
        processes.run(2, tmp_path, dying(work, place, turn, victim, signal.SIGKILL))
    processes.run(2, tmp_path, work)
    assert digest(tmp_path / "run") == unbroken(2, kind)
