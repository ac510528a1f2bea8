"""Rewards as a string: `pickscore/26 + 0.5*hpsv2.1 + min(clip, ocr)`. It is parsed, and never run as code.

    sum     = product { ("+" | "-") product }
    product = signed { ("*" | "/") signed }
    signed  = { "+" | "-" } atom
    atom    = number | name | name "(" sum { "," sum } ")" | "(" sum ")"

A name may have digits, dots and underscores. Before "(" it is one of `FUNCTIONS`, elsewhere one of `REWARDS` or of
those that are given. Products of rewards are taken, quotients are not: only a number divides.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from flowalign.config.paths import locate, suggest
from flowalign.records import Media, Prompts, Scores
from rewards.algebra import (
    Clip,
    Gate,
    GroupNormalise,
    Mean,
    MeanMinusStd,
    Normalise,
    RunningNormalise,
    Spread,
    WorstCase,
    running_normalisers,
)
from rewards.base import Minimum, Product, Reward
from rewards.shaping import PAR, LambdaHarmonic, LogSigmoid, TextNorm, UncertaintyWeighted

MAX_LENGTH = 1000  # characters; a reward of ten terms has some 150
MAX_DEPTH = 20  # of parentheses, functions and signs; each costs several frames of Python's stack of 1000

# Short names, in the order of the alphabet; what each leads to is called without arguments, when it is first needed.
REWARDS: dict[str, str] = {
    "aesthetic": "rewards.aesthetic.Aesthetic",
    "clip": "rewards.clip.CLIPScore",
    "colourfulness": "rewards.colourfulness.Colourfulness",
    "ctc_text": "rewards.ctc.CTCText",
    "geneval": "rewards.geneval.GenEval",
    "hpsv2.1": "rewards.hps.HPSv2",
    "hpsv3": "rewards.hpsv3.HPSv3",
    "imagereward": "rewards.image_reward.ImageReward",
    "jpeg": "rewards.jpeg.JPEGCompressibility",
    "jpeg_incompressibility": "rewards.jpeg.JPEGIncompressibility",
    "mps": "rewards.mps.MPS",
    "ocr": "rewards.ocr.OCR",
    "pickscore": "rewards.pickscore.PickScore",
    "shapes": "rewards.shapes.ShapesVerifier",
    "shapes_video": "rewards.shapes_video.ShapesVideoVerifier",
    "siglip": "rewards.siglip.SigLIPScore",
    "videoreward": "rewards.video_reward.VideoReward",
}

Value = Reward | float
ANY = 1000  # more arguments than fit into an expression


@dataclass(frozen=True)
class Function:
    """A function of an expression: rewards first, then numbers, each at least and at most as many."""

    usage: str
    rewards: tuple[int, int]
    numbers: tuple[int, int]
    make: Callable[[list[Reward], list[float]], Reward]


FUNCTIONS: dict[str, Function] = {
    "clip": Function("clip(x, low, high)", (1, 1), (2, 2), lambda r, n: Clip(r[0], *n)),
    "gate": Function("gate(x, condition, threshold[, floor])", (2, 2), (1, 2), lambda r, n: Gate(r[0], r[1], *n)),
    "group_normalise": Function("group_normalise(x[, eps])", (1, 1), (0, 1), lambda r, n: GroupNormalise(r[0], *n)),
    "harmonic": Function("harmonic(x, y[, weight])", (2, 2), (0, 1), lambda r, n: LambdaHarmonic(r[0], r[1], *n)),
    "log_sigmoid": Function(
        "log_sigmoid(x[, reference, ...])", (1, 1), (0, ANY), lambda r, n: LogSigmoid(r[0], n or (0.0,))
    ),
    "mean": Function("mean(x, y, ...)", (2, ANY), (0, 0), lambda r, n: Mean(r)),
    "mean_minus_std": Function(
        "mean_minus_std(x, y, ...[, k])", (2, ANY), (0, 1), lambda r, n: MeanMinusStd(r, n[0] if n else 1.0)
    ),
    "min": Function("min(x, y, ...)", (1, ANY), (0, 0), lambda r, n: Minimum(r)),
    "neg": Function("neg(x)", (1, 1), (0, 0), lambda r, n: -r[0]),
    "normalise": Function("normalise(x, mean, std)", (1, 1), (2, 2), lambda r, n: Normalise(r[0], *n)),
    "par": Function("par(x[, reference, ...])", (1, 1), (0, ANY), lambda r, n: PAR(r[0], n or (0.0,))),
    "product": Function("product(x, y, ...)", (1, ANY), (0, 0), lambda r, n: Product(r)),
    "running_normalise": Function("running_normalise(x)", (1, 1), (0, 0), lambda r, n: RunningNormalise(r[0])),
    "sigmoid": Function("sigmoid(x)", (1, 1), (0, 0), lambda r, n: PAR(r[0])),
    "spread": Function("spread(x, y, ...)", (1, ANY), (0, 0), lambda r, n: Spread(r)),
    "textnorm": Function("textnorm(x[, temperature])", (1, 1), (0, 1), lambda r, n: TextNorm(r[0], *n)),
    "uncertain": Function(
        "uncertain(x, uncertainty[, penalty])", (2, 2), (0, 1), lambda r, n: UncertaintyWeighted(r[0], r[1], *n)
    ),
    "worst": Function("worst(x, y, ...)", (2, ANY), (0, 0), lambda r, n: WorstCase(r)),
}


class ExpressionError(ValueError):
    """An expression that cannot be read; the message is one line that says where."""


def parse_reward(expression: str, rewards: Mapping[str, Reward] | None = None) -> Reward:
    """The reward that an expression describes; every reward that it names is made once, after all else was checked.

    In a config: `{class: rewards.expression.parse_reward, expression: "pickscore/26 + mine", rewards: {mine: ...}}`.

    Args:
        expression: see the top of this module, `FUNCTIONS` and `REWARDS`.
        rewards: rewards by names of their own, which come before those of `REWARDS`, for instance from a local folder.

    Raises: ExpressionError for what is no expression of rewards, ValueError for a reward that cannot be made.
    """
    given = dict(rewards or {})
    for name in given:
        if not _NAME.fullmatch(name):
            raise ExpressionError(f"{name!a} is no name of a reward: letters, digits, '_' and '.', a letter first")
    named: dict[str, Reward] = {}
    _Parser(expression, {name: given.get(name) or _Named(name) for name in (*REWARDS, *given)}, named).reward()
    made = {name: given[name] if name in given else locate(REWARDS[name])() for name in named}
    reward = _Parser(expression, made, {}).reward()
    running_normalisers(reward)  # which says where two share a name
    return reward


class _Named(Reward):
    """In the place of a reward that is not made yet, while the expression is checked."""

    def __init__(self, name: str) -> None:
        self.name = name

    def score(self, media: Media, prompts: Prompts) -> Scores:
        raise AssertionError("only the expression's form is looked at")


@dataclass(frozen=True)
class _Token:
    kind: str  # "number", "name", "mark" or "end"
    text: str
    at: int

    def __str__(self) -> str:
        return "the end" if self.kind == "end" else repr(self.text)


_SPACE = " \t\r\n"
_TOKEN = re.compile(
    r"(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)|(?P<name>[A-Za-z_]\w*(?:\.\w+)*)|(?P<mark>[-+*/(),])",
    re.ASCII,
)
_NAME = re.compile(r"[A-Za-z_]\w*(?:\.\w+)*", re.ASCII)


class _Parser:
    """One pass over an expression by recursive descent; the rewards that it names are noted in `used`."""

    def __init__(self, expression: str, known: Mapping[str, Reward], used: dict[str, Reward]) -> None:
        self.expression, self.known, self.used = expression, known, used
        self.next, self.depth = 0, 0
        if len(expression) > MAX_LENGTH:
            raise ExpressionError(f"an expression has at most {MAX_LENGTH} characters, this one has {len(expression)}")
        self.tokens = self._tokens()

    def reward(self) -> Reward:
        """The reward that the whole expression makes."""
        if self.tokens[0].kind == "end":
            raise ExpressionError("the expression is empty; write for instance 'pickscore/26 + 0.5*clip'")
        value = self._sum()
        if self._token.kind != "end":
            raise self._error(f"expected an operator or the end, got {self._token}", self._token.at)
        if not isinstance(value, Reward):
            raise ExpressionError(f"the expression {self.expression!a} has no reward, only numbers")
        return value

    def _tokens(self) -> list[_Token]:
        tokens, at = list[_Token](), 0
        while at < len(self.expression.rstrip(_SPACE)):
            at += len(self.expression[at:]) - len(self.expression[at:].lstrip(_SPACE))
            found = _TOKEN.match(self.expression, at)
            if found is None:
                raise self._error(f"unexpected character {self.expression[at]!a}", at)
            tokens.append(_Token(str(found.lastgroup), found.group(), at))
            at = found.end()
        return [*tokens, _Token("end", "", at)]

    def _sum(self) -> Value:
        value = self._product()
        while (sign := self._take("+", "-")) is not None:
            term = self._product()
            value = value + term if sign.text == "+" else value - term
            if not isinstance(value, Reward):
                self._finite(value, sign)
        return value

    def _product(self) -> Value:
        """Numbers are gathered into one factor, so that a long product is no deep one."""
        first = self._signed()
        rewards, factor = ([first], 1.0) if isinstance(first, Reward) else ([], first)
        while (sign := self._take("*", "/")) is not None:
            value = self._signed()
            if sign.text == "*" and isinstance(value, Reward):
                rewards.append(value)
            elif isinstance(value, Reward):
                raise self._error("only a number can divide, not a reward", sign.at)
            elif sign.text == "/" and value == 0:
                raise self._error("division by zero", sign.at)
            else:
                factor = self._finite(factor * value if sign.text == "*" else factor / value, sign)
        if not rewards:
            return factor
        product = rewards[0] if len(rewards) == 1 else Product(rewards)
        return product if factor == 1 else product * factor

    def _signed(self) -> Value:
        sign = self._take("+", "-")
        if sign is None:
            return self._atom()
        value = self._deeper(self._signed, sign)
        return -value if sign.text == "-" else value

    def _atom(self) -> Value:
        token = self._token
        self.next += 1
        if token.kind == "number":
            return self._finite(float(token.text), token)
        if token.text == "(":
            value = self._deeper(self._sum, token)
            self._expect(")", token)
            return value
        if token.kind != "name":
            raise self._error(f"expected a reward, a number or '(', got {token}", token.at)
        return self._call(token) if self._take("(") is not None else self._named(token)

    def _named(self, token: _Token) -> Reward:
        if token.text not in self.known:
            fix = suggest(token.text, self.known) or f"; there are {', '.join(sorted(self.known))}"
            if token.text in FUNCTIONS:
                fix = f"; the function is written {FUNCTIONS[token.text].usage}"
            raise self._error(f"unknown reward {token.text!r}", token.at, fix)
        self.used[token.text] = self.known[token.text]
        return self.known[token.text]

    def _call(self, token: _Token) -> Reward:
        if token.text not in FUNCTIONS:
            fix = suggest(token.text, FUNCTIONS) or f"; there are {', '.join(FUNCTIONS)}"
            raise self._error(f"unknown function {token.text!r}", token.at, fix)
        function, values = FUNCTIONS[token.text], [self._deeper(self._sum, token)]
        while self._take(",") is not None:
            values.append(self._deeper(self._sum, token))
        self._expect(")", token)
        rewards = [value for value in values if isinstance(value, Reward)]
        numbers = [value for value in values if not isinstance(value, Reward)]
        counts = ((len(rewards), function.rewards), (len(numbers), function.numbers))
        fits = all(least <= count <= most for count, (least, most) in counts)
        if not fits or any(isinstance(value, Reward) for value in values[len(rewards) :]):
            raise self._error(f"{token.text!r} is written {function.usage}, rewards before numbers", token.at)
        try:
            return function.make(rewards, numbers)
        except ValueError as error:
            raise self._error(str(error), token.at) from error

    @property
    def _token(self) -> _Token:
        return self.tokens[self.next]

    def _take(self, *marks: str) -> _Token | None:
        """The next token if it is one of these marks."""
        token = self._token
        if token.kind != "mark" or token.text not in marks:
            return None
        self.next += 1
        return token

    def _expect(self, mark: str, opened: _Token) -> None:
        if self._take(mark) is None:
            got = self._token
            raise self._error(f"expected {mark!r} for what {opened} opens, got {got}", got.at)

    def _deeper(self, parse: Callable[[], Value], token: _Token) -> Value:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise self._error(f"more than {MAX_DEPTH} parentheses, functions and signs within one another", token.at)
        value = parse()
        self.depth -= 1
        return value

    def _finite(self, value: float, token: _Token) -> float:
        if not math.isfinite(value):
            raise self._error("the number is too large", token.at)
        return value

    def _error(self, what: str, at: int, fix: str = "") -> ExpressionError:
        """One line: what is wrong, at which character from 1 on, and the text around it with '>>>' before it."""
        start = max(at - 30, 0)
        near = self.expression[start:at] + ">>>" + self.expression[at : at + 30]
        return ExpressionError(f"{what} at {at + 1} in {near!a}{fix}")
