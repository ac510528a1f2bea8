"""Judges that are known by name: VQAScore, Q-Align's levels, UnifiedReward, UnifiedReward-Think, Soft-TIFA.

The questions are in our own words but for the short phrases that answers are read by. A model that was tuned on a
wording is asked best in that wording: give it as `template`, from the model's own repository.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rewards.base import Card
from rewards.chat import Chat, Endpoint
from rewards.judge import Judge, PairJudge, Parse
from rewards.verdicts import answer_probability, levels_expectation, pair_winner, regex_score, yes_no_log_odds

VQA = 'Does this picture show "{prompt}"? Please answer Yes or No.'
QUALITY = "How good is the quality of this picture? Answer with one word: excellent, good, fair, poor or bad."
POINT = """Here is a picture that was made for this caption: {prompt}
Judge how well it fits the caption and how good it looks, from 1 (worst) to 5 (best), decimals allowed.
End with the line
Final Score: X"""
SCORE = r"Score(?: \(1-5\))?:\s*([0-9.]+)"
THREE_SCORES = rf"Alignment {SCORE}\s*Coherence {SCORE}\s*Style {SCORE}"  # of UnifiedReward 2.0
PAIR = """Here are two pictures that were made for this caption: {prompt}
Which of them is better: which fits the caption more closely, looks better and is more real in its details?
Think inside <think> and </think>, with a score out of 10 for each picture and each of these three.
Then end with either <answer>Image 1 is better</answer> or <answer>Image 2 is better</answer>."""
# GenEval 2 writes counts as words, and models may answer with digits
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
DIGITS = {word: str(number) for number, word in enumerate(NUMBERS, 1)}


class VQAScore(Judge):
    """log P(yes) - log P(no) to the question whether a picture shows the prompt; any sign, higher is better.

    VQAScore (arXiv:2404.01291) is P(yes), which hardly moves where a model is sure. One token is asked for, so that a
    model that thinks first has to be told not to, in the endpoint's or the local model's options. A local model lists
    every spelling of yes and no, so that there the odds are exact.
    """

    tokens = 1

    def __init__(self, endpoint: Endpoint | Chat, template: str = VQA, name: str = "vqa_score") -> None:
        super().__init__(endpoint, template, yes_no_log_odds, name)


class QualityLevels(Judge):
    """The expected level of quality, 1 (bad) to 5 (excellent), as Q-Align (arXiv:2312.17090) and DeQA-Score have it."""

    card = Card(weights="of who is asked", licence="that of the model", usual=(1, 5), modality="any")
    tokens = 1

    def __init__(self, endpoint: Endpoint | Chat, template: str = QUALITY, name: str = "quality_levels") -> None:
        super().__init__(endpoint, template, levels_expectation, name)


class UnifiedReward(Judge):
    """UnifiedReward's point score (arXiv:2503.05236), 1 to 5: the mean of the groups of `pattern`.

    For version 2's three scores give its template and the pattern `THREE_SCORES`. Weights under the MIT licence.
    Flow-GRPO divides by 5 and scores 0 where no score is found; here that is invalid.
    """

    card = Card(weights="CodeGoat24/UnifiedReward-*", licence="MIT", usual=(1, 5), modality="any")
    logprobs = False

    def __init__(
        self,
        endpoint: Endpoint | Chat,
        template: str = POINT,
        pattern: str = r"Final Score:\s*([0-9]+(?:\.[0-9]+)?)",
        name: str = "unified_reward",
    ) -> None:
        super().__init__(endpoint, template, regex_score(pattern, 1.0, 5.0), name)


class UnifiedRewardThink(PairJudge):
    """Win rates by UnifiedReward-Think (arXiv:2505.03318), each pair in both orders. Weights under the MIT licence."""

    card = Card(weights="CodeGoat24/UnifiedReward-Think-*", licence="MIT", usual=(0, 1), modality="any", scope="group")

    def __init__(
        self, endpoint: Endpoint | Chat, template: str = PAIR, opponents: int = 0, name: str = "unified_reward_think"
    ) -> None:
        super().__init__(endpoint, template, pair_winner, opponents, name)


class SoftTIFA(Judge):
    """Mean probability of the expected answers to the questions of a prompt, in [0, 1] (GenEval 2, arXiv:2512.16853).

    The questions are the prompt's metadata["vqa_list"], [[question, answer], ...], as in GenEval 2's data; an answer
    may be a list of spellings. Parts: "soft_tifa_am", the arithmetic mean, which is for single facts, and
    "soft_tifa_gm", the geometric, which is for whole prompts: one missing fact brings it down. A probability below
    1e-6, or of a word that is not among the alternatives, counts as 1e-6 in the latter.

    Args:
        geometric: whether the score is the geometric mean.

    Raises: ValueError for a prompt without questions.
    """

    card = Card(weights="of who is asked", licence="that of the model", usual=(0, 1), modality="any")
    tokens = 1

    def __init__(
        self,
        endpoint: Endpoint | Chat,
        template: str = "{question} Answer in one word.",
        geometric: bool = True,
        name: str = "soft_tifa",
    ) -> None:
        super().__init__(endpoint, template, yes_no_log_odds, name)
        self.geometric = geometric

    def questions(self, prompt: str, metadata: Mapping[str, Any]) -> list[tuple[str, Parse]]:
        try:
            asked = [(str(question), answer) for question, answer in metadata["vqa_list"]]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"SoftTIFA: {prompt!r:.80} has no metadata['vqa_list'] [[question, answer], ...]"
            ) from error
        if not asked:
            raise ValueError(f"SoftTIFA: metadata['vqa_list'] of {prompt!r:.80} is empty")
        return [
            (self.template.replace("{question}", question), answer_probability(spellings(answer)))
            for question, answer in asked
        ]

    def combine(self, values: Sequence[float]) -> dict[str, float]:
        arithmetic = sum(values) / len(values)
        geometric = math.exp(sum(math.log(max(value, 1e-6)) for value in values) / len(values))
        means = {"soft_tifa_am": arithmetic, "soft_tifa_gm": geometric}
        return {self.name: geometric if self.geometric else arithmetic} | means


def spellings(answer: str | Sequence[str]) -> tuple[str, ...]:
    """An answer in all its spellings: a number also in digits."""
    words = [str(answer)] if isinstance(answer, str | int) else [str(one) for one in answer]
    return tuple(dict.fromkeys([*words, *(DIGITS[word.lower()] for word in words if word.lower() in DIGITS)]))
