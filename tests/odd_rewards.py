"""Rewards that draw numbers, fail, dawdle or talk, for tests in this process and in another."""

from __future__ import annotations

import os
import random
import time

import numpy as np
import torch
from torch import Tensor

from flowalign.records import Media, Prompts


def drawing(media: Media, prompts: Prompts) -> Tensor:
    """A patch of each picture, and what python, numpy and torch draw; slow enough for a rollout to come between."""
    found = []
    for picture in media.pixels:
        time.sleep(0.002)
        noise = random.random() + random.gauss(0, 1) + np.random.standard_normal() + float(torch.randn(()))
        found.append(30 * picture[0, 8:12, 8:12].mean() + noise)
    return torch.stack(found)


def odd(media: Media, prompts: Prompts) -> Tensor:
    """As `drawing`, unless the first prompt says something else."""
    word, _, rest = prompts.text[0].partition(" ")
    if word == "refuse":
        raise ValueError(f"no score\nfor {rest}")
    if word == "fail":
        raise KeyError(rest)
    if word == "memory":
        raise torch.OutOfMemoryError("too much")
    if word == "talk":
        print("to no one", flush=True)
        os.write(1, b"nor here\n")
    if word == "sleep":
        time.sleep(float(rest))
    if word == "told":
        return torch.tensor([float(row["weight"]) for row in prompts.metadata]) + float(media.fps or 0)
    return drawing(media, prompts)
