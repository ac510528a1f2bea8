"""How a judge's answer becomes a number, and judges that are known by name."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

LEVELS = ("excellent", "good", "fair", "poor", "bad")
CHOICES = ("yes", "no", *LEVELS)  # whose log-probabilities are read out of an answer, likely or not
BLANKS = "\u2581\u0120"  # as SentencePiece and byte-level BPE write them
NO_FIGURE = -1000.0  # OpenAI's API writes -9999 for what it gives no figure of


class Unreadable(ValueError):
    """An answer that is not of the form that was asked for."""


@dataclass(frozen=True)
class Answer:
    """A model's text, and the likeliest alternatives to its first token with their log-probabilities."""

    text: str
    top: tuple[tuple[str, float], ...] = ()


def yes_no_log_odds(answer: Answer) -> float:
    """log P(yes) - log P(no) of the first token: unbounded, unlike VQAScore's P(yes), so that it does not saturate.

    VQAScore (arXiv:2404.01291, Lin et al.) is its sigmoid where yes and no are all there is. Spellings of a word are
    added up. A word that is not among the alternatives is counted as likely as the least likely of them, so that the
    odds are a lower bound on what they are.

    Raises: Unreadable where neither is among them, or there are none.
    """
    known = _listed(answer)
    yes, no = (_log_sum([p for word, p in known if word == wanted]) for wanted in ("yes", "no"))
    if math.isinf(yes) and math.isinf(no):
        raise Unreadable("neither yes nor no is likely")
    least = min(p for _, p in known)
    return max(yes, least) - max(no, least)


def levels_expectation(answer: Answer) -> float:
    """sum_k (5 - k) P(word_k) / sum_k P(word_k) over excellent, good, fair, poor and bad, in [1, 5].

    Q-Align (arXiv:2312.17090, Wu et al.), of the first token, which may be a word's beginning. Words that are not among
    the alternatives count nothing.

    Raises: Unreadable where none of them is among the alternatives.
    """
    known = _listed(answer)
    weights = [sum(math.exp(p) for token, p in known if _begins(token, word)) for word in LEVELS]
    if not sum(weights):
        raise Unreadable("none of the levels is likely")
    return sum((5 - k) * weight for k, weight in enumerate(weights)) / sum(weights)


def answer_probability(expected: Sequence[str]) -> Callable[[Answer], float]:
    """P(first token begins one of the expected words), in [0, 1]; what is not among the alternatives adds nothing.

    Soft-TIFA's score of a question (GenEval 2, arXiv:2512.16853).
    """
    words = tuple(_bare(word) for word in expected)
    if not all(words):
        raise ValueError(f"an expected answer is empty: {expected!r}")

    def parse(answer: Answer) -> float:
        return sum(math.exp(p) for token, p in _listed(answer) if any(_begins(token, word) for word in words))

    return parse


def regex_score(pattern: str, low: float, high: float) -> Callable[[Answer], float]:
    """The mean of a pattern's groups, each a number in [low, high]; the last match in the text counts.

    Reasoning between <think> and </think> is left out. UnifiedReward's point score is
    `regex_score("Final Score:\\\\s*([1-5](?:\\\\.\\\\d+)?)", 1, 5)`.

    Raises: ValueError for a pattern that is none, or has no group. The parse raises Unreadable where nothing matches or
    a number is out of range.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"pattern: {pattern!r} is no regular expression ({error})") from error
    if not compiled.groups or not low < high:
        raise ValueError(f"a score needs a pattern with a group, and low < high, got {pattern!r}, {low} and {high}")

    def parse(answer: Answer) -> float:
        found = [*compiled.finditer(said(answer.text))]
        if not found:
            raise Unreadable("no score in it")
        try:
            values = [float(group.rstrip(".")) for group in found[-1].groups()]  # a sentence may end there
        except (AttributeError, ValueError) as error:
            raise Unreadable("what should be a score is no number") from error
        if not all(low <= value <= high for value in values):
            raise Unreadable(f"a score is not in [{low:g}, {high:g}]")
        return sum(values) / len(values)

    return parse


def yes_or_no(answer: Answer) -> float:
    """1 where the text says yes, and -1 where it says no, by its first word. Raises: Unreadable where it is neither."""
    found = re.match(r"\W*(yes|no)\b", said(answer.text), re.IGNORECASE)
    if not found:
        raise Unreadable("it begins with neither yes nor no")
    return 1.0 if found[1].lower() == "yes" else -1.0


AFFIRMED = r"(?!(?:not|never|no|hardly|barely|neither)\b)\w+"  # a word between "is" and "better" that does not deny it


def pair_winner(answer: Answer) -> float:
    """1 where the answer says that image (or video) 1 is better, 0 for 2, and 0.5 for both or "equally good".

    UnifiedReward's and UnifiedReward-Think's forms: "Image 1 is better", with or without <think> before and <answer>
    around it. Raises: Unreadable where it says neither, or both.
    """
    text = said(answer.text)
    better = set(re.findall(rf"\b(?:image|video) ([12]) (?:is|was) (?:{AFFIRMED} )?better", text, re.IGNORECASE))
    equal = re.search(r"\b(?:equally good|tie|both (?:images|videos) are equal)", text, re.IGNORECASE)
    if len(better) > 1 or (not better and not equal):
        raise Unreadable("it names no winner" if not better else "it names both as winner")
    return {"1": 1.0, "2": 0.0}[better.pop()] if better else 0.5


def said(text: str) -> str:
    """What a text says in the end: what is inside its last <answer>, else what comes after its reasoning.

    Raises: Unreadable where the reasoning was cut off before its end.
    """
    found = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
    if found:
        return str(found[-1])
    if "<think>" in text and "</think>" not in text:
        raise Unreadable("its reasoning was cut off; raise max_tokens")
    return text.rsplit("</think>", 1)[-1]


def _listed(answer: Answer) -> list[tuple[str, float]]:
    """The first token's alternatives in lower case without blanks, less those without a figure."""
    known = [(_bare(token), p) for token, p in answer.top if NO_FIGURE < p <= 0.01]
    if not known:
        raise Unreadable("it has no log-probabilities; the endpoint has to give top_logprobs")
    return known


def spells(token: str, words: Sequence[str]) -> bool:
    """Whether a token, its blanks and case aside, is one of the words or, from three letters on, its beginning."""
    return any(_begins(_bare(token), word) for word in words)


def _bare(token: str) -> str:
    return (
        token.strip().strip("\u2581\u0120").strip(" .,\"'*:").lower()
    )  # blanks of SentencePiece and of byte-level BPE


def _begins(token: str, word: str) -> bool:
    """Whether a token is a word or, from three letters on, its beginning."""
    return token == word or (len(token) >= 3 and word.startswith(token))


def _log_sum(values: Sequence[float]) -> float:
    """log sum_k exp(values_k), -inf for none."""
    most = max(values, default=-math.inf)
    return most if math.isinf(most) else most + math.log(sum(math.exp(value - most) for value in values))
