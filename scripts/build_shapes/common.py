"""What the stages share: scenes with captions, and a fit that goes on where it was interrupted."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flowalign.shapes import scenes
from flowalign.shapes.prompts import held_out


def captioned(count: int, seed: int, wrong: dict[str, float]) -> Iterator[tuple[scenes.Spec, str, np.ndarray]]:
    """Scenes of training meanings with their pictures and captions, a share of which is wrong in one respect.

    Neither the scene nor the caption of a pair has a held-out meaning.
    """
    rng = np.random.default_rng(seed)
    while count:
        spec = scenes.random_spec(rng)
        if held_out(spec):
            continue
        told = scenes.corrupt(spec, rng) if rng.random() < wrong[spec.kind] else spec
        yield spec, scenes.caption(spec if held_out(told) else told, rng), scenes.render(spec, rng)
        count -= 1


def batches(total: int, size: int, seed: int, start: int) -> Iterator[Tensor]:
    """Row indexes of endless random batches; batch k is the same wherever a run was interrupted."""
    step = start
    while True:
        yield torch.from_numpy(np.random.default_rng((seed, step)).integers(0, total, size))
        step += 1


def fit(
    name: str,
    module: torch.nn.Module,
    loss_of: Callable[[int], Tensor],
    steps: int,
    learning_rate: float,
    out: Path,
    report: Callable[[], str] = lambda: "",
) -> None:
    """AdamW with warm-up and cosine decay over `loss_of(step)`, an EMA of the weights, and a state file each minute."""
    file = out / f"{name}_state.pt"
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    ema = {key: value.clone() for key, value in module.state_dict().items()}
    start, saved, seconds = 0, time.time(), 0.0
    if file.exists():
        state = torch.load(file, weights_only=True)
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        ema, start, seconds = state["ema"], state["step"], state["seconds"]
    began = time.time() - seconds
    recent: list[float] = []
    for step in range(start, steps):
        for group in optimizer.param_groups:
            group["lr"] = (
                learning_rate
                * min(1.0, (step + 1) / 200)
                * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
            )
        loss = loss_of(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        decay = min(0.999, (1 + step) / (10 + step))
        with torch.no_grad():
            for key, value in module.state_dict().items():
                ema[key].lerp_(value, 1 - decay) if value.is_floating_point() else ema[key].copy_(value)
        recent.append(loss.item())
        if time.time() - saved > 60 or step + 1 == steps:
            saved, seconds = time.time(), time.time() - began
            state = {"module": module.state_dict(), "optimizer": optimizer.state_dict(), "ema": ema, "step": step + 1}
            torch.save(state | {"seconds": seconds}, file.with_suffix(".tmp"))
            file.with_suffix(".tmp").rename(file)
            print(f"{name} {step + 1}/{steps} loss {np.mean(recent):.5f} {seconds:.0f}s {report()}", flush=True)
            recent.clear()
    module.load_state_dict(ema)
