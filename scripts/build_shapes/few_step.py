"""A LoRA of the base that draws in one to four steps without guidance: reflow of its guided ODE.

Rectified flow straightened once (arXiv:2209.03003, algorithm 1; InstaFlow, arXiv:2309.06380): pairs of start noise and
what the guided base makes of it are joined by straight lines, and the network learns their velocity. Half of the
training is at pure noise, where a single step begins.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from common import batches, fit
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flowalign.adapters import LoRA
from flowalign.models import SD3
from flowalign.randomness import key_noise
from flowalign.rollout import Policy, rollout
from flowalign.schedules import Path as Plan
from flowalign.schedules import linear
from flowalign.shapes import scenes
from flowalign.shapes.prompts import held_out
from flowalign.transitions import ODE

PAIRS = 60_000
CALL = 256  # rows of a teacher's call
TEACHER_STEPS, GUIDANCE = 12, 3.0
STEPS, BATCH, LEARNING_RATE = 9_000, 64, 1e-3
RANK = 24


def captions(count: int) -> list[str]:
    """Right captions of training meanings."""
    rng, found = np.random.default_rng(21), list[str]()
    while len(found) < count:
        spec = scenes.random_spec(rng)
        if not held_out(spec):
            found.append(scenes.caption(spec, rng))
    return found


def start_noise(rows: range, shape: tuple[int, ...]) -> Tensor:
    """Unit noise of each row, a function of its number."""
    return torch.stack([key_noise(0, "few_step", row, shape=shape) for row in rows])


@torch.no_grad()
def teach(out: Path, teacher: SD3, told: list[str]) -> Tensor:
    """What the guided base makes of each caption's noise, kept in files of 6,000 so that a stop loses little."""
    parts, path = [], Plan((ODE(),) * TEACHER_STEPS)
    for first in range(0, PAIRS, 6_000):
        file = out / f"few_step_{first:06d}.npy"
        if not file.exists():
            made, began = [], time.time()
            for start in range(first, min(first + 6_000, PAIRS), CALL):
                rows = range(start, min(start + CALL, first + 6_000, PAIRS))
                condition = teacher.encode([told[row] for row in rows])
                noise = start_noise(rows, teacher.latent_shape)
                sigmas, policy = teacher.sigmas(TEACHER_STEPS), Policy(GUIDANCE)
                with torch.autocast("cpu", torch.bfloat16):
                    made.append(rollout(teacher, condition, noise, sigmas, path, policy).latents)
            np.save(file, torch.cat(made).numpy())
            print(f"few_step pairs {first + 6_000}/{PAIRS} {time.time() - began:.0f}s", flush=True)
        parts.append(torch.from_numpy(np.load(file)))
    return torch.cat(parts)


def build_few_step(out: Path) -> None:
    """Pairs of the embedded base, then the LoRA, left in `few_step/` as plain diffusers loads it."""
    teacher = SD3("shapes", grid=linear, max_sequence_length=0, prompts_per_call=64, embeddings_gb=0.05)
    told = captions(PAIRS)
    target = teach(out, teacher, told)
    (out / "few_step_captions.json").write_text(json.dumps(told))
    student = SD3(
        "shapes",
        lora=LoRA(rank=RANK, alpha=RANK),
        grid=linear,
        max_sequence_length=0,
        prompts_per_call=64,
        embeddings_gb=0.05,
    )

    def loss_of(step: int) -> Tensor:
        rows, rng = next(batches(PAIRS, BATCH, 9, step)), torch.Generator().manual_seed(step)
        noise = torch.cat([start_noise(range(row, row + 1), student.latent_shape) for row in rows.tolist()])
        sigma = 1.0 if step % 2 else float(torch.rand((), generator=rng))
        latents = (1 - sigma) * target[rows] + sigma * noise
        condition = student.encode([told[row] for row in rows.tolist()])
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            predicted = student.network(latents, sigma, condition)
        return F.mse_loss(predicted, noise - target[rows])

    fit("few_step", student.module, loss_of, STEPS, LEARNING_RATE, out)
    student.save(out / "few_step")
