"""The verifier of the embedded world as a reward: are the shapes that the caption asks for in the picture?"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from flowalign.records import Media, Prompts, Scores
from flowalign.shapes.scenes import SIZE, Spec
from flowalign.shapes.verifier import passes, verify
from rewards.base import Reward
from rewards.pixels import finite, pictures

KINDS = ("object", "count", "size", "relation", "nothing else")


class ShapesVerifier(Reward):
    """(1 - w) * clauses + w * strict, in [0, 1]; not differentiable.

    clauses: the mean score of the caption's clauses (objects, counts, size, relation, nothing else); a clause's score
    rises smoothly as it comes nearer to holding. strict: 1 where all of them hold, else 0. Both are parts of the score,
    and so is, for each kind of clause, whether all of that kind hold ("clause/count": 1 or 0, nan where there is none).

    Args:
        strict_weight: w, in [0, 1].

    Raises: ValueError for another weight, for pictures that are not 32 x 32, and for a prompt without a spec.
    """

    name = "shapes"

    def __init__(self, strict_weight: float = 0.5) -> None:
        if not 0 <= strict_weight <= 1:
            raise ValueError(f"strict_weight must be in [0, 1], got {strict_weight}")
        self.strict_weight = float(strict_weight)

    def score(self, media: Media, prompts: Prompts) -> Scores:
        pixels = pictures(media, "ShapesVerifier")
        if pixels.shape[2:] != (SIZE, SIZE):
            raise ValueError(f"ShapesVerifier reads pictures of {SIZE} x {SIZE}, got {list(pixels.shape[2:])}")
        found, verdict = verify(pixels, [_spec(prompts, i) for i in range(len(prompts))])
        clauses = torch.tensor([sum(scores.values()) / len(scores) for scores in found], device=pixels.device)
        strict = verdict.to(pixels.device).float()
        total = (1 - self.strict_weight) * clauses + self.strict_weight * strict
        kinds = {f"clause/{kind}": _of_kind(found, kind).to(pixels.device) for kind in KINDS}
        return Scores(total, {"clauses": clauses, "strict": strict, **kinds}, finite(pixels))


def _of_kind(found: list[dict[str, float]], kind: str) -> Float[Tensor, " b"]:
    """Whether all clauses of a kind hold in each picture; nan where its caption has none."""
    own = [{name: value for name, value in scores.items() if name.startswith(kind)} for scores in found]
    return torch.tensor([float(passes(scores)) if scores else math.nan for scores in own])


def _spec(prompts: Prompts, index: int) -> Spec:
    told = prompts.metadata[index].get("spec")
    if told is None:
        raise ValueError(
            f"prompt {index} ({prompts.text[index]!r}) has no metadata['spec'] for ShapesVerifier; "
            "take prompts from flowalign.shapes.prompts.train_prompts or held_out_prompts"
        )
    try:
        return Spec.from_dict(told)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"prompt {index} ({prompts.text[index]!r}): metadata['spec'] is no scene: {reason}") from error
