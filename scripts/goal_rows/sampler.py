"""What an epoch samples, in random shapes of runs: nothing lost, nothing twice, prompts evenly."""

from __future__ import annotations

import random
import time
from collections import Counter
from itertools import pairwise
from typing import Any

from flowalign.distributed import share
from flowalign.models.gaussian import GaussianModel
from flowalign.prompts import as_prompts
from flowalign.rollout import Policy
from flowalign.schedules import AllSteps
from flowalign.transitions import FlowSDE
from rewards import JPEGCompressibility
from trainers import Sampling
from trainers.collection import Collection


def cases_of(count: int) -> dict[str, Any]:
    """How many random shapes of a run have a sample lost, made twice, or prompts that come unevenly.

    A case is one epoch: prompts, groups, samples of a group, micro-batches, processes and seed are drawn.
    """
    rng, wrong, began = random.Random(0), [], time.monotonic()
    model, reward = GaussianModel(), JPEGCompressibility()
    done = 0
    while done < count:
        total, groups, size, batch, seed = (rng.randint(1, most) for most in (37, 12, 8, 9, 99))
        sampling = Sampling(AllSteps(FlowSDE(0.7)), groups, size, batch_size=batch, steps=10)
        collection = Collection(
            model, reward, as_prompts([str(number) for number in range(total)]), sampling, Policy(), seed
        )
        taken = Counter[int]()
        for number in range(8):
            epoch, done = collection.epoch(number), done + 1
            cuts, world = epoch.cuts(batch), rng.randint(1, 33)
            parts = [share(len(cuts) - 1, process, world) for process in range(world)]
            rows = [row for part in parts for row in collection.rows_of(epoch, part)]
            whole = [(group, member) for group in range(groups) for member in range(size)]
            taken.update(epoch.prompts)
            even = max(taken.values()) - min(taken[prompt] for prompt in range(total)) <= 1
            short = all(0 < stop - start <= batch for start, stop in pairwise(cuts))
            if [epoch.rows[row] for row in rows] != whole or not even or not short:
                wrong.append([total, groups, size, batch, world, seed, number])
    return {"cases": done, "wrong": wrong, "spent": time.monotonic() - began}
