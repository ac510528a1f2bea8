"""For all tests, before anything is imported: shapes and types checked at every call, one thread, fixed seeds."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import jaxtyping
import numpy as np
import pytest
import torch
import typecheck

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
jaxtyping.jaxtyped = typecheck.jaxtyped  # what the hook decorates with
jaxtyping.install_import_hook(["flowalign", "rewards", "trainers"], "typecheck.check")


def pytest_collection_finish() -> None:
    """What is imported stays: the garbage collector need not walk it again and again, here and in forks."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Own noise is keyed and needs no seed; this is for weights that a test draws at random."""
    typecheck.begin()
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, str]]:
    """What a run that nothing happens to comes to: `tests.interrupted.unbroken_runs`."""
    from tests.interrupted import unbroken_runs  # after the hook above

    return unbroken_runs(tmp_path_factory.mktemp("unbroken"))
