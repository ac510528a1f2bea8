"""How often the embedded few-step model is right in 1, 2 and 4 steps, beside the base that it was distilled from.

    python scripts/few_step_accuracy.py --prompts 512

Strict accuracy by the verifier on held-out prompts, from the same start noise; the interval is 1.96 standard errors.
"""

from __future__ import annotations

import argparse

import torch

from flowalign.media import shown
from flowalign.models import SD3
from flowalign.records import Prompts
from flowalign.sample import pictures
from flowalign.schedules import linear
from flowalign.shapes import held_out_prompts
from rewards import ShapesVerifier

CASES = (("shapes-few-step", 1, 1.0), ("shapes-few-step", 2, 1.0), ("shapes-few-step", 4, 1.0),
         ("shapes", 10, 1.0), ("shapes", 10, 3.0), ("shapes", 4, 3.0), ("shapes", 1, 1.0))  # fmt: skip


def strict(name: str, steps: int, guidance: float, prompts: Prompts) -> torch.Tensor:
    """1 for each prompt whose picture is right, 0 otherwise."""
    model = SD3(name, grid=linear, max_sequence_length=0)
    drawn = torch.cat(list(pictures(model, prompts, steps, guidance, 3, "few_step_accuracy", 128)))
    return ShapesVerifier()(shown(drawn, prompts), prompts).parts["strict"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=512)
    arguments = parser.parse_args()
    prompts = held_out_prompts(arguments.prompts, 11)
    for name, steps, guidance in CASES:
        right = strict(name, steps, guidance, prompts)
        error = 1.96 * right.std().item() / len(right) ** 0.5
        print(f"{name:16} {steps:3} steps, guidance {guidance:g}: {right.mean():.3f} +- {error:.3f}", flush=True)


if __name__ == "__main__":
    main()
