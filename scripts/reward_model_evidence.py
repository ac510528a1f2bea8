"""A reward trained on 500 preferences between base samples of the embedded world, beside zero-shot CLIP.

    python scripts/reward_model_evidence.py            # right against wrong decides
    python scripts/reward_model_evidence.py --full     # all of CLIP is tuned
    python scripts/reward_model_evidence.py --total    # the verifier's total decides, whatever its difference

Two pictures per training prompt from keyed noise; the verifier prefers the one that it scores higher, and ties are
dropped. Agreement is printed on the pairs that training left over, and on pairs of held-out prompts.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from flowalign.models import SD3
from flowalign.pictures import to_bytes
from flowalign.records import Media, Prompts
from flowalign.sample import pictures
from flowalign.schedules import linear
from flowalign.shapes import held_out_prompts, train_prompts
from rewards import ShapesVerifier
from rewards.preference import LearntReward, Pair
from trainers.reward_model import RewardFit, calibration_error, fit, outcomes

KINDS = ("single", "size", "count", "pair", "relation", "count_pair")


def sampled_pairs(model: SD3, prompts: Prompts, purpose: str, strict: bool) -> list[Pair]:
    """Two samples for each prompt, as the verifier prefers them; those that it scores equally are left out."""
    both = prompts.rows([*range(len(prompts))] * 2)
    made = torch.cat(list(pictures(model, both.text, 6, 1.0, 5, purpose, 60)))
    pixels = to_bytes(made).float() / 255
    scores = ShapesVerifier()(Media(pixels), both)
    judged = (scores.parts["strict"] if strict else scores.total).tolist()
    count = len(prompts)
    return [
        Pair(prompts.text[i], pixels[i], pixels[i + count], "first" if judged[i] > judged[i + count] else "second")
        for i in range(count)
        if judged[i] != judged[i + count]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--total", action="store_true", help="the verifier's total decides, not its strict verdict")
    parser.add_argument("--model", default="shapes", help="the CLIP that training starts from")
    parser.add_argument("--full", action="store_true", help="tune all of CLIP, not the head alone")
    parser.add_argument("--prompts", type=int, default=3000, help="training prompts to sample pairs for")
    parser.add_argument("--pairs", type=int, default=500)
    parser.add_argument("--epochs", type=int, default=None)
    parser.add_argument("--learning-rate", type=float, default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", type=Path, default=None, help="a new folder for the trained reward")
    asked = parser.parse_args()
    model = SD3("shapes", grid=linear, max_sequence_length=0)
    pairs = sampled_pairs(model, train_prompts(asked.prompts, 4, KINDS), "train", not asked.total)
    unseen = sampled_pairs(model, held_out_prompts(asked.prompts // 2, 4, KINDS), "test", not asked.total)
    if len(pairs) <= asked.pairs:
        parser.error(f"{len(pairs)} decided pairs of {asked.prompts} prompts: ask for more --prompts, or fewer --pairs")
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(asked.seed)).tolist()
    pairs = [pairs[i] for i in order]
    reward = LearntReward(asked.model)
    rate = asked.learning_rate or (1e-4 if asked.full else 3e-3)
    settings = RewardFit(asked.epochs or (10 if asked.full else 20), 32, rate, full=asked.full, seed=asked.seed)
    names, sets = ("training prompts", "held-out prompts"), (pairs[asked.pairs :], unseen)
    zero_shot = [outcomes(reward, part) for part in sets]
    fit(reward, pairs[: asked.pairs], pairs[asked.pairs :], settings)
    for name, part, (cosine, won) in zip(names, sets, zero_shot, strict=True):
        difference, _ = outcomes(reward, part)
        before, after = (float(((d > 0) == won).float().mean()) for d in (cosine, difference))
        error = calibration_error(difference, won)
        print(f"{name}: {len(part)} pairs, trained {after:.3f}, zero-shot {before:.3f}, calibration {error:.3f}")
    if asked.save is not None:
        reward.save(asked.save)


if __name__ == "__main__":
    main()
