"""Vision-language models as judges, over any OpenAI-compatible endpoint (vLLM, SGLang, hosted ones).

A judge is a question about a picture and a way to read the answer; `rewards.verdicts` has the ways. An answer that
cannot be read makes its sample invalid, and its text is kept.
"""

from __future__ import annotations

import base64
import json
import logging
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flowalign.pictures import to_bytes
from flowalign.records import Media, Prompts, Scores
from rewards.base import Card, Reward
from rewards.payload import png
from rewards.verdicts import Answer, Unreadable, pair_winner, yes_no_log_odds
from rewards.wire import Address, address, ask, gather

MAX_FAILURES = 100  # that are kept
MOST_LOGPROBS = 20  # that OpenAI's API gives
_log = logging.getLogger("flowalign")

Parse = Callable[[Answer], float]


@dataclass(frozen=True)
class Endpoint:
    """A served model and how it is asked.

    url: up to and with /v1. model: its name there. api_key: the name of an environment variable that holds the key, ""
    for none; the key itself is in no config, and shown nowhere. budget: seconds for one question, retries included.
    in_flight: questions under way at once. frames: of a video that are shown, evenly spaced. max_tokens: of an answer.
    options: further keys of the request, such as {"chat_template_kwargs": {"enable_thinking": false}}; null takes one
    away that would be sent otherwise.
    """

    url: str
    model: str
    api_key: str = ""
    budget: float = 120.0
    retries: int = 5
    in_flight: int = 8
    frames: int = 8
    max_tokens: int = 1024
    options: Mapping[str, Any] | None = None

    def address(self) -> Address:
        """Where questions go, with the key. Raises: ValueError where the environment has none, or settings are off."""
        if min(self.in_flight, self.frames, self.max_tokens) < 1:
            raise ValueError("in_flight, frames and max_tokens of an endpoint must be at least 1")
        key = os.environ.get(self.api_key, "").strip() if self.api_key else ""
        if self.api_key and not (key and key.isascii() and key.isprintable()):
            raise ValueError(f"api_key: the environment variable {self.api_key!r:.60} holds no key")
        url = self.url.rstrip("/").removesuffix("/chat/completions")
        return address("judge", url, key, float(self.budget), self.retries)


@dataclass(frozen=True)
class Failure:
    """An answer that could not be read: to what, its text, and what was wrong."""

    prompt: str
    question: str
    text: str
    reason: str


class Asker(Reward):
    """What all judges share: questions with pictures, side by side, their answers read or kept as failures.

    logprobs: whether the first token's alternatives are asked for. tokens: of an answer, where fewer than the
    endpoint's `max_tokens` will do.
    """

    logprobs: bool = False
    tokens: int | None = None

    def __init__(self, endpoint: Endpoint, name: str) -> None:
        self.endpoint, self.to, self.name = endpoint, endpoint.address(), name
        self.failures: deque[Failure] = deque(maxlen=MAX_FAILURES)

    def put(self, prompt: str, question: str, shown: Sequence[str], parse: Parse, stop: threading.Event) -> float:
        """What `parse` makes of the answer to a question about pictures (data URLs); nan where it cannot."""
        pictures = [{"type": "image_url", "image_url": {"url": url}} for url in shown]
        content = [*pictures, {"type": "text", "text": question}]
        body = {
            "model": self.endpoint.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "max_tokens": min(self.tokens or self.endpoint.max_tokens, self.endpoint.max_tokens),
            **({"logprobs": True, "top_logprobs": MOST_LOGPROBS} if self.logprobs else {}),
            **(self.endpoint.options or {}),
        }
        raw = json.dumps({name: value for name, value in body.items() if value is not None}).encode()
        answer = self._answer(ask(self.to, "/chat/completions", raw, stop))
        try:
            value = float(parse(answer))
            if not math.isfinite(value):
                raise Unreadable(f"{value} is no finite number")
            return value
        except Unreadable as error:
            self._keep(Failure(prompt, question, self._masked(answer.text), str(error)))
            return math.nan

    def _answer(self, given: Any) -> Answer:
        """Text and the first token's alternatives. Raises: ValueError for what is no chat completion."""
        try:
            choice = given["choices"][0]
            text = choice["message"].get("content") or ""
            first = ((choice.get("logprobs") or {}).get("content") or [{}])[0]
            top = [(str(one["token"]), float(one["logprob"])) for one in first.get("top_logprobs") or []]
            return Answer(str(text), tuple(top))
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{self.to}: its answer is no chat completion; does the url end with /v1?") from error

    def _masked(self, text: str) -> str:
        return text.replace(self.to.key, "***") if self.to.key else text

    def _keep(self, failure: Failure) -> None:
        self.failures.append(failure)
        _log.warning("%s: an answer cannot be read (%s): %.300r", self.name, failure.reason, failure.text)

    def shown(self, media: Media, row: int) -> list[str]:
        """A picture, or the chosen frames of a video, as data URLs."""
        pixels = media.pixels[row]
        if media.is_video:
            count = min(self.endpoint.frames, len(pixels))
            pixels = pixels[torch.linspace(0, len(pixels) - 1, count).round().long()]
        frames = to_bytes(pixels if media.is_video else pixels[None])
        return [f"data:image/png;base64,{base64.b64encode(png(frame)).decode()}" for frame in frames]


class Judge(Asker):
    """The mean of what `parse` reads out of the answers to questions about each sample; not differentiable.

    By itself it puts one question, the template. Words and weights of the models are their makers'; only the arithmetic
    is tested here.

    Args:
        endpoint: the served model.
        template: the question; {prompt} in it stands for the prompt.
        parse: from an `Answer` to a number, higher is better; it raises `Unreadable` where it cannot. See
            `rewards.verdicts`: yes_no_log_odds, levels_expectation, regex_score(pattern, low, high).
        name: of the score.

    Raises: ValueError for a template without {prompt} and an endpoint that is none. Scoring raises OSError where the
    endpoint cannot be had, and ValueError where it refuses.
    """

    card = Card(weights="of the endpoint", licence="that of the served model", modality="any")
    logprobs = True

    def __init__(self, endpoint: Endpoint, template: str, parse: Parse = yes_no_log_odds, name: str = "judge") -> None:
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

    def score(self, media: Media, prompts: Prompts) -> Scores:
        asked = [self.questions(text, data) for text, data in zip(prompts.text, prompts.metadata, strict=True)]
        asks = [partial(self._row, media, prompts.text[row], row, questions) for row, questions in enumerate(asked)]
        found = gather(asks, self.endpoint.in_flight)
        broken = [any(math.isnan(value) for value in values) for values in found]
        names = self.combine([0.5])
        parts = {name: [math.nan] * len(found) for name in names}
        for row, values in enumerate(found):
            for name, value in ({} if broken[row] else self.combine(values)).items():
                parts[name][row] = value
        made = {name: torch.tensor(values, device=media.pixels.device) for name, values in parts.items()}
        valid = torch.tensor([not bad for bad in broken], device=media.pixels.device)
        return Scores(made[self.name], made, valid)

    def _row(
        self, media: Media, prompt: str, row: int, questions: list[tuple[str, Parse]], stop: threading.Event
    ) -> list[float]:
        pictures = self.shown(media, row)
        return [self.put(prompt, question, pictures, parse, stop) for question, parse in questions]


class PairJudge(Asker):
    """The share of its group's other samples that each is preferred to, in [0, 1]; ties count half.

        score_i = mean_j (p(i, j) + 1 - p(j, i)) / 2,    p(a, b) = 1 where the answer prefers a, shown first; else 0

    Pref-GRPO's win rate (arXiv:2508.20751), asked in both orders, so that a judge who prefers what is shown first adds
    nothing but ties. The part "agree" is the share of a sample's pairs in which both orders say the same. A pair of
    which one answer cannot be read is left out; a sample with less than half of its pairs left is invalid.

    Args:
        endpoint: the served model.
        template: the question about two pictures, with {prompt}; two questions per pair are put.
        parse: 1 where the first is better, 0 where the second is, 0.5 for a tie.
        opponents: compare each with that many next to it in the group, not with all: n * opponents pairs, not
            n (n - 1) / 2. 0 for all.
        name: of the score.
    """

    card = Card(
        weights="of the endpoint", licence="that of the served model", usual=(0, 1), modality="any", scope="group"
    )

    def __init__(
        self,
        endpoint: Endpoint,
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
        asks = [partial(self._compare, pictures, prompts.text, a, b) for a, b in orders]
        found = torch.tensor(gather(asks, self.endpoint.in_flight), dtype=torch.float64).reshape(-1, 2)
        return self._tally(pairs, found, len(media), media.pixels.device)

    def _pairs(self, group: int, groups: Sequence[int]) -> list[tuple[int, int]]:
        rows = [row for row, other in enumerate(groups) if other == group]
        n, reach = len(rows), self.opponents or len(rows)
        found = {tuple(sorted((k, (k + step) % n))) for k in range(n) for step in range(1, min(reach, n - 1) + 1)}
        return [(rows[a], rows[b]) for a, b in sorted(found)]

    def _compare(
        self, pictures: list[list[str]], texts: Sequence[str], first: int, second: int, stop: threading.Event
    ) -> float:
        question = self.template.replace("{prompt}", texts[first])
        return self.put(texts[first], question, [*pictures[first], *pictures[second]], self.parse, stop)

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
