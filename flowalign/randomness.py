"""Noise by name: every random number is a function of (seed, purpose, key), never of what was drawn before it.

A sample's noise is keyed by what the sample is (epoch, group, member, step), so a run does not depend on how its
samples are split over micro-batches or processes, and a resumed run needs no generator state.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

_globals = threading.RLock()  # who holds it may set the global generators, which all threads share


def key_generator(seed: int, purpose: str, *key: int) -> np.random.Generator:
    """A numpy generator for the key: the same key gives the same stream, any other key an independent one.

    Philox (Salmon et al., SC 2011) takes a 128-bit key, here the hash of the whole key; torch's own CPU generator keeps
    32 bits of its seed, so distinct keys would collide.

    Args:
        seed: the run's seed, any integer.
        purpose: what the numbers are for ("start_noise", "step_noise" ...); purposes do not share numbers.
        key: integers of any size and count; (1, 2) and (12,) differ.
    """
    name = repr((int(seed), purpose, tuple(int(part) for part in key))).encode()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(blake2b(name, digest_size=16).digest(), "big")))


def key_noise(seed: int, purpose: str, *key: int, shape: tuple[int, ...]) -> Float[Tensor, "*shape"]:
    """Standard normal noise of the given shape, float32 on the CPU, drawn from `key_generator(seed, purpose, *key)`.

    Draw one sample at a time (shape without the batch) and stack: the numbers of a larger shape do not contain those
    of a smaller one at any promised place.
    """
    return torch.from_numpy(np.asarray(key_generator(seed, purpose, *key).standard_normal(shape, dtype=np.float32)))


@contextmanager
def keyed_globals(seed: int, purpose: str, *key: int) -> Iterator[None]:
    """While entered, the global generators of python, numpy and torch are functions of the key.

    For code of others that draws from them, a user's reward for one: its numbers then depend neither on how samples are
    split over processes nor on what was drawn before, so that a resumed run needs no generator's state. One thread at a
    time: another one that enters waits.
    """
    drawn = int(key_generator(seed, purpose, *key).integers(2**32))
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with _globals, torch.random.fork_rng(devices):
        before = random.getstate(), np.random.get_state()
        random.seed(drawn)
        np.random.seed(drawn)
        torch.manual_seed(drawn)
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])
