"""Vision-language models as judges, served by an endpoint or run on this machine.

A judge is a question about a picture and a way to read the answer; `rewards.verdicts` has the ways, `rewards.chat` who
is asked. An answer that cannot be read makes its sample invalid, and its text is kept.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowalign.pictures import to_bytes
from flowalign.records import Media, Prompts, Scores
from rewards.base import Card, Reward
from rewards.chat import Chat, Endpoint, Picture, Served, Showing, chat
from rewards.verdicts import Answer, Unreadable, pair_winner, yes_no_log_odds

__all__ = ["MAX_FAILURES", "Asker", "Endpoint", "Failure", "Judge", "PairJudge", "Parse"]

MAX_FAILURES = 100  # that are kept
_log = logging.getLogger("flowalign")

Parse = Callable[[Answer], float]


@dataclass(frozen=True)
class Failure:
    """An answer that could not be read: to what, its text, and what was wrong."""

    prompt: str
    question: str
    text: str
    reason: str


class Asker(Reward):
    """What all judges share: questions with pictures, their answers read or kept as failures; no gradient.

    logprobs: whether the first token's alternatives are asked for. tokens: of an answer, where fewer than the
    `max_tokens` of who is asked will do.
    """

    logprobs: bool = False
    tokens: int | None = None

    def __init__(self, endpoint: Endpoint | Chat, name: str) -> None:
        self.endpoint, self.chat, self.name = endpoint, chat(endpoint), name
        self.to = self.chat.to if isinstance(self.chat, Served) else None
        self.ahead = int(isinstance(self.chat, Served))
        self.failures: deque[Failure] = deque(maxlen=MAX_FAILURES)

    def _check(self, media: Media, prompts: Prompts, grad: bool) -> None:
        if grad:
            raise ValueError(
                f"{type(self).__name__} has no gradient: its model's processor takes pictures in 8 bits and prepares "
                "them outside of torch"
            )
        super()._check(media, prompts, grad)

    def read(self, prompt: str, question: str, answer: Answer, parse: Parse) -> float:
        """What `parse` makes of an answer; nan where it cannot."""
        try:
            value = float(parse(answer))
            if not math.isfinite(value):
                raise Unreadable(f"{value} is no finite number")
            return value
        except Unreadable as error:
            self._keep(Failure(prompt, question, answer.text, str(error)))
            return math.nan

    def _keep(self, failure: Failure) -> None:
        self.failures.append(failure)
        _log.warning("%s: an answer cannot be read (%s): %.300r", self.name, failure.reason, failure.text)

    def shown(self, media: Media, row: int) -> tuple[Picture, ...]:
        """A picture, or the chosen frames of a video."""
        pixels = media.pixels[row]
        if media.is_video:
            count = min(self.chat.frames, len(pixels))
            pixels = pixels[torch.linspace(0, len(pixels) - 1, count).round().long()]
        frames = to_bytes(pixels if media.is_video else pixels[None])
        return tuple(Picture(frame, media.pixels.device) for frame in frames)


class Judge(Asker):
    """The mean of what `parse` reads out of the answers to questions about each sample; not differentiable.

    By itself it puts one question, the template. Words and weights of the models are their makers'; only the arithmetic
    is tested here.

    Args:
        endpoint: who is asked: an `Endpoint`, or a model on this machine (`rewards.local_vlm.LocalVLM`).
        template: the question; {prompt} in it stands for the prompt.
        parse: from an `Answer` to a number, higher is better; it raises `Unreadable` where it cannot. See
            `rewards.verdicts`: yes_no_log_odds, levels_expectation, regex_score(pattern, low, high).
        name: of the score.

    Raises: ValueError for a template without {prompt} and an endpoint that is none. Scoring raises OSError where the
    endpoint cannot be had, and ValueError where it refuses.
    """

    card = Card(weights="of who is asked", licence="that of the model", modality="any")
    logprobs = True

    def __init__(
        self, endpoint: Endpoint | Chat, template: str, parse: Parse = yes_no_log_odds, name: str = "judge"
    ) -> None:
        super().__init__(endpoint, name)
        if not template.strip():
            raise ValueError("template: a judge needs a question")
        self.template, self.parse = template, parse

    def questions(self, prompt: str, metadata: Mapping[str, Any]) -> list[tuple[str, Parse]]:
        """What is asked about a sample, and how each answer is read."""
        return [(self.template.replace("{prompt}", prompt), self.parse)]

    def combine(self, values: Sequence[float]) -> dict[str, float]:
        """The parts of a score from its answers' values, all of them readable; the one of this reward's name is it."""
        return {self.name: sum(values) / len(values)}

    def part_names(self) -> tuple[str, ...]:
        """The names of the parts, which are the same for every sample."""
        return tuple(self.combine([0.5]))

    def enough(self, values: Sequence[float]) -> bool:
        """Whether a sample has a score, by its answers' values, nan for those that could not be read."""
        return not any(math.isnan(value) for value in values)

    def score(self, media: Media, prompts: Prompts) -> Scores:
        asked = [self.questions(text, data) for text, data in zip(prompts.text, prompts.metadata, strict=True)]
        found = self._answered(media, prompts, asked)
        valid = [self.enough(values) for values in found]
        parts = {name: [math.nan] * len(found) for name in self.part_names()}
        for row, values in enumerate(found):
            for name, value in (self.combine(values) if valid[row] else {}).items():
                parts[name][row] = value
        made = {name: torch.tensor(values, device=media.pixels.device) for name, values in parts.items()}
        return Scores(made[self.name], made, torch.tensor(valid, device=media.pixels.device))

    def _answered(
        self, media: Media, prompts: Prompts, asked: Sequence[Sequence[tuple[str, Parse]]]
    ) -> list[list[float]]:
        """The value of each answer about each sample."""
        texts = [tuple(question for question, _ in row) for row in asked]
        showings = [Showing(self.shown(media, row), questions) for row, questions in enumerate(texts)]
        answers = self.chat.answers(showings, self.logprobs, self.tokens)
        return [
            [self.read(prompt, text, answer, parse) for (text, parse), answer in zip(row, given, strict=True)]
            for prompt, row, given in zip(prompts.text, asked, answers, strict=True)
        ]


class PairJudge(Asker):
    """The share of its group's other samples that each is preferred to, in [0, 1]; ties count half.

        score_i = mean_j (p(i, j) + 1 - p(j, i)) / 2,    p(a, b) = 1 where the answer prefers a, shown first; else 0

    Pref-GRPO's win rate (arXiv:2508.20751), asked in both orders, so that a judge who prefers what is shown first adds
    nothing but ties. The part "agree" is the share of a sample's pairs in which both orders say the same. A pair of
    which one answer cannot be read is left out; a sample with less than half of its pairs left is invalid.

    Args:
        endpoint: who is asked: an `Endpoint`, or a model on this machine (`rewards.local_vlm.LocalVLM`).
        template: the question about two pictures, with {prompt}; two questions per pair are put.
        parse: 1 where the first is better, 0 where the second is, 0.5 for a tie.
        opponents: compare each with that many next to it in the group, not with all: n * opponents pairs, not
            n (n - 1) / 2. 0 for all.
        name: of the score.
    """

    card = Card(weights="of who is asked", licence="that of the model", usual=(0, 1), modality="any", scope="group")

    def __init__(
        self,
        endpoint: Endpoint | Chat,
        template: str,
        parse: Parse = pair_winner,
        opponents: int = 0,
        name: str = "win_rate",
    ) -> None:
        super().__init__(endpoint, name)
        if not template.strip() or opponents < 0:
            raise ValueError(
                f"a pair judge needs a template, and opponents from 0 on, got {template!r} and {opponents}"
            )
        self.template, self.parse, self.opponents = template, parse, opponents

    def score(self, media: Media, prompts: Prompts) -> Scores:
        if prompts.groups is None:
            raise ValueError("PairJudge compares the samples of a group: it needs their group numbers (Prompts.groups)")
        pairs = [pair for group in dict.fromkeys(prompts.groups) for pair in self._pairs(group, prompts.groups)]
        pictures = [self.shown(media, row) for row in range(len(media))]
        orders = [order for a, b in pairs for order in ((a, b), (b, a))]
        texts = [self.template.replace("{prompt}", prompts.text[first]) for first, _ in orders]
        showings = [Showing((*pictures[a], *pictures[b]), (text,)) for (a, b), text in zip(orders, texts, strict=True)]
        answers = self.chat.answers(showings, self.logprobs, self.tokens)
        found = [
            self.read(prompts.text[first], text, answer, self.parse)
            for (first, _), text, (answer,) in zip(orders, texts, answers, strict=True)
        ]
        table = torch.tensor(found, dtype=torch.float64).reshape(-1, 2)
        return self._tally(pairs, table, len(media), media.pixels.device)

    def _pairs(self, group: int, groups: Sequence[int]) -> list[tuple[int, int]]:
        rows = [row for row, other in enumerate(groups) if other == group]
        n, reach = len(rows), self.opponents or len(rows)
        found = {tuple(sorted((k, (k + step) % n))) for k in range(n) for step in range(1, min(reach, n - 1) + 1)}
        return [(rows[a], rows[b]) for a, b in sorted(found)]

    def _tally(self, pairs: list[tuple[int, int]], found: Tensor, count: int, device: torch.device) -> Scores:
        won, agreed = torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
        read, put = torch.zeros(count), torch.zeros(count)
        for (a, b), (forth, back) in zip(pairs, found.tolist(), strict=True):
            for row, wins in ((a, (forth + 1 - back) / 2), (b, (1 - forth + back) / 2)):
                put[row] += 1
                if not math.isnan(wins):
                    read[row] += 1
                    won[row] += wins
                    agreed[row] += forth == 1 - back
        valid = (read > 0) & (2 * read >= put)
        total = (won / read).float().where(valid, torch.nan).to(device)
        parts = {self.name: total, "agree": (agreed / read).float().where(valid, torch.nan).to(device)}
        return Scores(total, parts, valid.to(device))
