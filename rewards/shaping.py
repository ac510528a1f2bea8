"""Rewards bent into another shape, against hacking: sigmoids about references, harmonic mean, contrast, uncertainty.

As in `rewards.algebra` each is again a reward with the parts of what it is made of, and has a gradient where that has.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from flowalign.records import Media, Prompts, Scores
from rewards.base import Combination, Elementwise, Reward, masked, valid_totals

References = Sequence[float] | Mapping[str, Sequence[float]]
CONTRASTIVE = "contrastive"  # the metadata of a prompt that holds its contrastive prompts


def reference_scores(reward: Reward, media: Media, prompts: Prompts) -> dict[str, list[float]]:
    """The valid scores of given media, such as the base model's samples, by the texts of their prompts.

    Raises: ValueError for a prompt none of whose media has a valid score.
    """
    scores = reward(media, prompts)
    found: dict[str, list[float]] = {text: [] for text in prompts.text}
    for text, value, valid in zip(prompts.text, scores.total.tolist(), scores.valid.tolist(), strict=True):
        found[text] += [value] if valid else []
    without = [text for text, values in found.items() if not values]
    if without:
        raise ValueError(f"no valid score of a reference for the prompt {without[0]!r}")
    return found


class Referred(Combination):
    """A reward seen from reference scores: numbers for all prompts alike, or each prompt's own by its text.

    Raises: ValueError for references that are empty or not finite, and for a prompt without.
    """

    def __init__(self, reward: Reward, references: References) -> None:
        super().__init__([reward])
        given = references.items() if isinstance(references, Mapping) else [(None, references)]
        self.references = {text: tuple(map(float, values)) for text, values in given}
        for text, values in self.references.items():
            if not values or not all(map(math.isfinite, values)):
                where = "" if text is None else f" for the prompt {text!r}"
                raise ValueError(f"{type(self).__name__} needs finite reference scores{where}, got {list(values)}")

    def score(self, media: Media, prompts: Prompts) -> Scores:
        references = [self._references(text) for text in prompts.text]
        terms = [self.rewards[0].score(media, prompts)]
        totals, valid = valid_totals(terms)
        return masked(self.shape(totals[0], references), terms, valid)

    @abstractmethod
    def shape(self, total: Float[Tensor, " b"], references: Sequence[tuple[float, ...]]) -> Float[Tensor, " b"]:
        """The shaped scores, from the scores and each sample's references."""

    def _references(self, text: str) -> tuple[float, ...]:
        found = self.references.get(text, self.references.get(None))
        if found is None:
            raise ValueError(f"{type(self).__name__} has no reference scores for the prompt {text!r}")
        return found


class PAR(Referred):
    """1/M sum_m sigmoid(k (reward - reference_m)), in (0, 1): how probably it is preferred to the references.

    Preference As Reward (arXiv:2502.18770): bounded, steep at the references and flat far above them, so that there is
    little to win by hacking. The authors have k = 1 and one to ten samples of the reference model per prompt; the
    probability is that of a Bradley-Terry reward, and another reward wants a k that suits its scale.

    Args:
        references: scores of the reference model, for all prompts or by the prompt's text; see `reference_scores`.
        k: > 0, steepness.
    """

    name = "par"

    def __init__(self, reward: Reward, references: References = (0.0,), k: float = 1.0) -> None:
        super().__init__(reward, references)
        if not (math.isfinite(k) and k > 0):
            raise ValueError(f"k must be positive, got {k}")
        self.k = k
        self.card = replace(self.card, usual=(0.0, 1.0))

    def shape(self, total: Float[Tensor, " b"], references: Sequence[tuple[float, ...]]) -> Float[Tensor, " b"]:
        preferred = [
            torch.sigmoid(self.k * (score - score.new_tensor(own))).mean()
            for score, own in zip(total, references, strict=True)
        ]
        return torch.stack(preferred)


class LogSigmoid(Referred):
    """log sigmoid(reward - q), with q a quantile of the references: < 0, and hardly rising above q.

    The LSC transformation of Wang et al. (arXiv:2402.00742): what is bad gains more than what is good already, and a
    sum of several is the log of the probability that all are good. For Bradley-Terry rewards; scale others first.

    Args:
        references: scores of the reference model, for all prompts or by the prompt's text; see `reference_scores`.
        quantile: in [0, 1], linear between neighbours; 0.85 is the authors'.
    """

    name = "log_sigmoid"

    def __init__(self, reward: Reward, references: References = (0.0,), quantile: float = 0.85) -> None:
        super().__init__(reward, references)
        if not 0 <= quantile <= 1:
            raise ValueError(f"quantile must be in [0, 1], got {quantile}")
        self.centers = {
            values: float(torch.tensor(values, dtype=torch.float64).quantile(quantile))
            for values in self.references.values()
        }

    def shape(self, total: Float[Tensor, " b"], references: Sequence[tuple[float, ...]]) -> Float[Tensor, " b"]:
        return F.logsigmoid(total - total.new_tensor([self.centers[own] for own in references]))


class LambdaHarmonic(Elementwise):
    """1 / (weight / first + (1 - weight) / second): the weighted harmonic mean, ruled by the lesser of the two.

    The lambda-harmonic reward of RPO (arXiv:2407.12164), which takes (cosine + 1) / 2 to the subject and to the text,
    in [0, 1]: write `LambdaHarmonic((subject + 1) / 2, (clip + 1) / 2, 0.5)`. At weight 1 it is the first, at 0 the
    second. Invalid where a reward is below 0; 0 where one of weight > 0 is 0, and its gradient there is the limit.

    Args:
        weight: lambda, in [0, 1]; the authors label with 0 and validate with values between.
    """

    name = "harmonic"

    def __init__(self, first: Reward, second: Reward, weight: float = 0.5) -> None:
        if not 0 <= weight <= 1:
            raise ValueError(f"weight must be in [0, 1], got {weight}")
        super().__init__([first, second])
        self.weight = weight

    def combine(self, totals: Float[Tensor, "2 b"]) -> Float[Tensor, " b"]:
        first, second = totals
        if self.weight in (0, 1):  # exactly, and for zeros too
            mean = first if self.weight == 1 else second
        else:
            below = self.weight * second + (1 - self.weight) * first
            mean = first * second / below.where(below > 0, 1.0)
        return mean.where((totals >= 0).all(0), torch.nan)


class UncertaintyWeighted(Elementwise):
    """exp(-U) reward - penalty U, with an uncertainty U >= 0 that is itself a reward, such as `Spread` of an ensemble.

    Ctrl-U (arXiv:2410.11236), whose loss is exp(-U) loss + 0.1 U. The gradient flows through exp(-U) too: where the
    reward is negative, as minus a loss, more uncertainty alone would raise the score, and the penalty is what stops
    that down to reward = -penalty; where it is positive, uncertainty lowers it anyhow. Invalid where U < 0. Ctrl-U's U
    is how far the results of two passes differ.

    Args:
        penalty: >= 0; 0.1 is the authors'.
    """

    name = "uncertainty_weighted"

    def __init__(self, reward: Reward, uncertainty: Reward, penalty: float = 0.1) -> None:
        if not (math.isfinite(penalty) and penalty >= 0):
            raise ValueError(f"penalty must be at least 0, got {penalty}")
        super().__init__([reward, uncertainty])
        self.penalty = penalty

    def combine(self, totals: Float[Tensor, "2 b"]) -> Float[Tensor, " b"]:
        reward, uncertainty = totals
        known = uncertainty >= 0
        uncertainty = uncertainty.where(known, 0.0)
        return (torch.exp(-uncertainty) * reward - self.penalty * uncertainty).where(known, torch.nan)


class TextNorm(Combination):
    """exp(r(x, y) / tau) / sum_y' exp(r(x, y') / tau), over the prompt y and its contrastive prompts; in (0, 1).

    TextNorm (arXiv:2404.01863, Kim et al.): how sure the reward is that the picture x shows y and not something like
    it; what any prompt would get for x cancels. A prompt's contrastive ones are its metadata["contrastive"], a list of
    texts that differ in objects, counts or relations; the authors have a language model write them. They are scored
    without metadata, so the reward has to be one that reads the text. Every picture is scored once for each. The parts
    are the reward's for the prompt itself; a contrastive prompt without a valid score makes the whole invalid.

    Args:
        temperature: tau > 0, in the unit of the reward.

    Raises: ValueError for a reward that compares samples, and for a prompt without contrastive ones.
    """

    name = "textnorm"

    def __init__(self, reward: Reward, temperature: float = 1.0) -> None:
        if not (math.isfinite(temperature) and temperature > 0):
            raise ValueError(f"temperature must be positive, got {temperature}")
        if reward.card.scope != "sample":
            raise ValueError(f"TextNorm compares prompts, and {reward.name!r} compares samples: swap them")
        super().__init__([reward])
        self.temperature = temperature
        self.card = replace(self.card, usual=(0.0, 1.0))

    def score(self, media: Media, prompts: Prompts) -> Scores:
        contrastive = [contrastive_prompts(prompts, i) for i in range(len(prompts))]
        terms = [self.rewards[0].score(media, prompts)]
        totals, valid = valid_totals(terms)
        columns = [totals[0]]
        for number in range(max(map(len, contrastive))):
            rows = [i for i, texts in enumerate(contrastive) if len(texts) > number]
            texts = Prompts(tuple(contrastive[i][number] for i in rows), ({},) * len(rows))
            found, known = valid_totals([self.rewards[0].score(media.rows(rows), texts)])
            index = torch.tensor(rows, device=valid.device)
            columns.append(torch.full_like(totals[0], -math.inf).index_put((index,), found[0]))
            valid = valid.index_put((index,), valid[index] & known)
        share = torch.stack(columns, 1).div(self.temperature).softmax(1)[:, 0]
        return masked(share, terms, valid)


def contrastive_prompts(prompts: Prompts, index: int) -> list[str]:
    """What a prompt's metadata["contrastive"] lists. Raises: ValueError where that is no list of texts, or empty."""
    texts = prompts.metadata[index].get(CONTRASTIVE)
    if not isinstance(texts, list | tuple) or not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(
            f"prompt {index} ({prompts.text[index]!r}) needs metadata {{'{CONTRASTIVE}': [texts that differ from it]}}"
        )
    return [*texts]
