"""ReNO against best-of-N on the embedded one-step model at equal compute, over seeds; the verifier looks on.

    python scripts/noise_search_evidence.py --prompts 64 --seeds 0 1 2

Both search for the embedded CLIP's score with the same budget in forwards of one network row (decode and reward at one
measured price), doubled from line to line: where ReNO's mean overtakes best-of-N's is the crossover budget. `right` is
the share of best samples that the verifier, which neither has seen, accepts.
"""

from __future__ import annotations

import argparse
import json

import torch

from flowalign.media import shown
from flowalign.models import SD3
from flowalign.records import Prompts
from flowalign.schedules import linear
from flowalign.shapes import held_out_prompts
from rewards import CLIPScore, ShapesVerifier
from trainers import BestOfN, ReNO
from trainers.noise_optim import Nesterov
from trainers.search import Search
from trainers.search_state import Candidate, Found

KINDS = ("single", "size", "count", "pair", "relation", "count_pair")


def right(candidates: list[Candidate | None], prompts: Prompts) -> float:
    """The share that the verifier accepts."""
    media = torch.stack([one.media for one in candidates if one is not None])
    return float(ShapesVerifier()(shown(media / 255, prompts), prompts).parts["strict"].mean())


def told(name: str, search: Search, prompts: Prompts) -> dict[str, float | str]:
    """What a search comes to."""
    found: list[Found] = search.find()
    scores = torch.tensor([one.best.score for one in found if one.best is not None])
    return {
        "search": name,
        "tries": found[0].tried,
        "cost": round(sum(one.cost for one in found) / len(found), 1),
        "score": round(float(scores.mean()), 4),
        "right": round(right([one.best for one in found], prompts), 3),
        "plain": round(sum(one.first.score for one in found if one.first) / len(found), 4),
        "plain right": round(right([one.first for one in found], prompts), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--budgets", type=float, nargs="+", default=[32, 64, 128, 256, 512])
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--rate", type=float, default=10.0, help="of ReNO's steps")
    arguments = parser.parse_args()
    model, reward = SD3("shapes-few-step", grid=linear, max_sequence_length=0), CLIPScore("shapes")
    prompts = held_out_prompts(arguments.prompts, 21, KINDS)
    prices = BestOfN(model, reward, prompts, 1, batch_size=64).start().prices
    print(json.dumps({"decode": prices.decode, "reward": prices.reward}), flush=True)
    for seed in arguments.seeds:
        for budget in arguments.budgets:
            shared = {"steps": arguments.steps, "seed": seed, "batch_size": 64, "budget": budget, "prices": prices}
            plain = BestOfN(model, reward, prompts, **shared)
            reno = ReNO(model, reward, prompts, 10_000, Nesterov(arguments.rate), **shared)
            for name, search in (("best of n", plain), ("reno", reno)):
                line = {"seed": seed, "budget": budget, **told(name, search, prompts)}
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
