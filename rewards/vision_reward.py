"""VisionReward: a checklist of yes/no questions and a linear model of the answers (arXiv:2412.21059, Xu et al.)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowalign.records import Media, Prompts, Scores
from rewards.base import Card
from rewards.chat import Chat, Endpoint
from rewards.judge import Judge, Parse
from rewards.judges import VQA
from rewards.verdicts import answer_probability, yes_or_no


@dataclass(frozen=True)
class Mask:
    """A question that gates others: where its answer is no, those count nothing. Numbers in the file, from 0."""

    gate: int
    masked: tuple[int, ...]


# whether there is a human body, a face, hands; the body's also gates harm, as in the authors' inference-image.py
MASKS = (Mask(0, (22, 23, 24, 28, 29)), Mask(1, (25, 26)), Mask(2, (27,)))


@dataclass(frozen=True)
class Checklist:
    """intercept + sum_k weight_k m_k a_k, with answers a_k of 1 or -1, and m_k 0 where a gate's answer is no, else 1.

    weights: one per question; a gate's is 0.
    """

    questions: tuple[str, ...]
    weights: tuple[float, ...]
    intercept: float = 0.0
    masks: tuple[Mask, ...] = ()

    def closed(self, answers: Sequence[float]) -> set[int]:
        """The questions that count nothing."""
        return {k for mask in self.masks if answers[mask.gate] < 0 for k in mask.masked}

    def value(self, answers: Sequence[float]) -> float:
        """The score; what is closed may be nan."""
        closed = self.closed(answers)
        kept = [k for k in range(len(answers)) if k not in closed]
        return self.intercept + sum(self.weights[k] * answers[k] for k in kept)


class ChecklistJudge(Judge):
    """What a checklist makes of a model's answers; one question of each is a chat of its own.

    A sample is invalid where an answer is neither yes nor no, unless it is to a question that a gate closes. The
    authors' code takes all that is not exactly "yes" for a no.
    """

    logprobs = False
    tokens = 1

    def __init__(self, endpoint: Endpoint | Chat, checklist: Checklist, name: str) -> None:
        super().__init__(endpoint, "{prompt}", yes_or_no, name)
        self.checklist = checklist

    def questions(self, prompt: str, metadata: Mapping[str, Any]) -> list[tuple[str, Parse]]:
        return [(text.replace("[[prompt]]", prompt), self.parse) for text in self.checklist.questions]

    def part_names(self) -> tuple[str, ...]:
        return (self.name,)

    def enough(self, values: Sequence[float]) -> bool:
        unread = {k for k, value in enumerate(values) if math.isnan(value)}
        return unread <= self.checklist.closed(values) - {mask.gate for mask in self.checklist.masks}

    def combine(self, values: Sequence[float]) -> dict[str, float]:
        return {self.name: self.checklist.value(values)}


class Alignment(Judge):
    """P(yes) to the question whether the picture shows the prompt: VQAScore (arXiv:2404.01291), in [0, 1]."""

    card = Card(weights="of who is asked", licence="that of the model", usual=(0, 1), modality="any")
    tokens = 1

    def __init__(self, endpoint: Endpoint | Chat, template: str = VQA, name: str = "alignment") -> None:
        super().__init__(endpoint, template, answer_probability(("yes",)), name)


class VisionReward(ChecklistJudge):
    """VisionReward's score of a picture: coef_0 P(yes) + sum_k coef_k m_k a_k + intercept; -2.5 to 4.9 with theirs.

    P(yes) is VQAScore, whether the picture fits the prompt; the a_k are 1 and -1, the answers to the checklist, which
    does not show the prompt. Parts: "checklist", all but the first term, and "alignment", P(yes).

    Questions and coefficients are the authors', not part of this package: VisionReward_image_qa_select.txt and
    weight_select.json, in VisionReward_Image of github.com/THUDM/VisionReward, under Apache-2.0. They were fitted to
    answers of THUDM/VisionReward-Image (Apache-2.0), which transformers does not load, and to VQAScore by
    clip-flant5-xxl. Another model's answers give another score: compare such scores only with each other.

    Args:
        endpoint: who answers: an `Endpoint`, or a `rewards.local_vlm.LocalVLM`.
        questions: a UTF-8 text file, one yes/no question a line.
        weights: a JSON file, {"coef": [c_0, c_1, ...], "intercept": [b] or b}: c_0 of the alignment, then one
            coefficient for each question that is no gate, in the file's order.
        masks: the gates; those of the authors' file by default, () for none.
        alignment: who is asked for P(yes), where it is somebody else; it has to give log-probabilities.
        template: the question for it, with {prompt}.

    Raises: ValueError where a file cannot be read or they do not fit each other.
    """

    card = Card("of who is asked; THUDM/VisionReward-Image's coefficients", "Apache-2.0", (-2.5, 4.9))

    def __init__(
        self,
        endpoint: Endpoint | Chat,
        questions: str,
        weights: str,
        masks: Sequence[Mask] = MASKS,
        alignment: Endpoint | Chat | None = None,
        template: str = VQA,
        name: str = "vision_reward",
    ) -> None:
        texts, (coefficients, intercept) = read_questions(questions), read_weights(weights)
        gates = _gates(masks, len(texts), questions)
        if len(coefficients) != 1 + len(texts) - len(gates):
            raise ValueError(
                f"VisionReward: {weights} has {len(coefficients)} coefficients, but {questions} needs "
                f"{1 + len(texts) - len(gates)}: one of the alignment, and one of each of {len(texts)} questions but "
                f"{len(gates)} gates"
            )
        left = iter(coefficients[1:])
        own = tuple(0.0 if k in gates else next(left) for k in range(len(texts)))
        super().__init__(endpoint, Checklist(texts, own, intercept, tuple(masks)), name)
        self.weight = coefficients[0]
        self.alignment = Alignment(alignment or self.chat, template)
        self.alignment.failures = self.failures

    def score(self, media: Media, prompts: Prompts) -> Scores:
        listed, fit = super().score(media, prompts), self.alignment.score(media, prompts)
        total = listed.total + self.weight * fit.total
        parts = {self.name: total, "checklist": listed.total, "alignment": fit.total}
        return Scores(total, parts, listed.valid & fit.valid)


class VisionRewardVideo(ChecklistJudge):
    """VisionReward's score of a video: mean_k weight_k a_k, with answers a_k of 1 and -1; [[prompt]] is the prompt.

    Questions and weights are the authors', not part of this package: VisionReward_video_qa_select.txt and weight.json,
    in VisionReward_Video of github.com/THUDM/VisionReward, under Apache-2.0, fitted to answers of
    THUDM/VisionReward-Video (Apache-2.0), which transformers does not load. Its authors show a frame a second, at most
    24; here `frames` of who is asked are shown, evenly spaced: give it the video's seconds, up to 24.

    Args:
        endpoint: who answers: an `Endpoint`, or a `rewards.local_vlm.LocalVLM`.
        questions: a UTF-8 text file, one yes/no question a line, which may hold [[prompt]].
        weights: a JSON file, a list with one number per question.

    Raises: ValueError where a file cannot be read or they do not fit each other.
    """

    card = Card("of who is asked; THUDM/VisionReward-Video's weights", "Apache-2.0", (-0.22, 0.22), "video")

    def __init__(
        self, endpoint: Endpoint | Chat, questions: str, weights: str, name: str = "vision_reward_video"
    ) -> None:
        texts, (numbers, intercept) = read_questions(questions), read_weights(weights)
        if len(numbers) != len(texts) or intercept:
            raise ValueError(
                f"VisionRewardVideo: {weights} must be a list of {len(texts)} numbers, one per question of "
                f"{questions}, got {len(numbers)}"
            )
        super().__init__(endpoint, Checklist(texts, tuple(number / len(texts) for number in numbers)), name)


def read_questions(path: str) -> tuple[str, ...]:
    """The lines of a text file without blanks around them. Raises: ValueError where there is none, or one is empty."""
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").strip().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"VisionReward: the questions {path} cannot be read: {error}") from error
    texts = tuple(line.strip() for line in lines)
    if not texts or not all(texts):
        raise ValueError(f"VisionReward: {path} must hold one question a line, and no empty line between them")
    return texts


def read_weights(path: str) -> tuple[tuple[float, ...], float]:
    """Coefficients and intercept of {"coef": [...], "intercept": b or [b]}, or of a list; ValueError for all else."""
    try:
        held = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"VisionReward: the weights {path} cannot be read: {error}") from error
    given = held if isinstance(held, dict) else {"coef": held, "intercept": 0.0}
    numbers, intercept = given.get("coef"), given.get("intercept")
    single: list[Any] = intercept if isinstance(intercept, list) else [intercept]
    if not isinstance(numbers, list) or len(single) != 1 or not all(map(_is_number, [*numbers, *single])):
        raise ValueError(
            f'VisionReward: {path} must hold {{"coef": [numbers], "intercept": number}}, or a list of numbers'
        )
    return tuple(map(float, numbers)), float(single[0])


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _gates(masks: Sequence[Mask], count: int, path: str) -> set[int]:
    named = [k for mask in masks for k in (mask.gate, *mask.masked)]
    if any(not 0 <= k < count for k in named):
        raise ValueError(f"VisionReward: a mask names a question that {path}, of {count}, has not: give its masks")
    return {mask.gate for mask in masks}
