"""How vision-language models are asked: questions about pictures in, texts and log-probabilities out.

A judge needs no more than `Chat.answers`. Two things are asked so: an `Endpoint`, here, which serves a model over HTTP,
and a `rewards.local_vlm.LocalVLM`, which runs one on this machine.
"""

from __future__ import annotations

import base64
import json
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from rewards.payload import png
from rewards.verdicts import Answer
from rewards.wire import Address, address, ask, gather

MOST_LOGPROBS = 20  # that OpenAI's API gives


@dataclass(frozen=True)
class Picture:
    """A picture in 8 bits on the CPU, and the device that it came from."""

    pixels: UInt8[Tensor, "3 h w"]
    device: torch.device

    @cached_property
    def url(self) -> str:
        """The same as a data URL of a PNG, made once."""
        return f"data:image/png;base64,{base64.b64encode(png(self.pixels)).decode()}"


@dataclass(frozen=True)
class Showing:
    """Pictures that are shown together, in order, and what is asked about them; each question is a chat of its own."""

    pictures: tuple[Picture, ...]
    questions: tuple[str, ...]


class Chat(ABC):
    """A vision-language model that answers questions about pictures, the likeliest token at every step.

    frames: of a video that are shown, evenly spaced.
    """

    frames: int

    @abstractmethod
    def answers(self, showings: Sequence[Showing], logprobs: bool, tokens: int | None) -> list[list[Answer]]:
        """The answer to each question of each showing, in order.

        Args:
            logprobs: whether the first token's alternatives are wanted.
            tokens: of an answer, where fewer than the model's own limit will do.
        """


@dataclass(frozen=True)
class Endpoint:
    """A model served by anything that speaks OpenAI's API (vLLM, SGLang, hosted ones), and how it is asked.

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


class Served(Chat):
    """The model at an endpoint. Showings go side by side, the questions of one after the other.

    Raises: ValueError for an endpoint that is none. Asking raises OSError where it cannot be had, and ValueError where
    it refuses.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint, self.to, self.frames = endpoint, endpoint.address(), endpoint.frames

    def answers(self, showings: Sequence[Showing], logprobs: bool, tokens: int | None) -> list[list[Answer]]:
        asks = [partial(self._ask_all, showing, logprobs, tokens) for showing in showings]
        return gather(asks, self.endpoint.in_flight)

    def _ask_all(self, showing: Showing, logprobs: bool, tokens: int | None, stop: threading.Event) -> list[Answer]:
        return [self._ask(showing, question, logprobs, tokens, stop) for question in showing.questions]

    def _ask(
        self, showing: Showing, question: str, logprobs: bool, tokens: int | None, stop: threading.Event
    ) -> Answer:
        pictures = [{"type": "image_url", "image_url": {"url": picture.url}} for picture in showing.pictures]
        content = [*pictures, {"type": "text", "text": question}]
        body = {
            "model": self.endpoint.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "max_tokens": min(tokens or self.endpoint.max_tokens, self.endpoint.max_tokens),
            **({"logprobs": True, "top_logprobs": MOST_LOGPROBS} if logprobs else {}),
            **(self.endpoint.options or {}),
        }
        raw = json.dumps({name: value for name, value in body.items() if value is not None}).encode()
        return self._answer(ask(self.to, "/chat/completions", raw, stop))

    def _answer(self, given: Any) -> Answer:
        """Text and the first token's alternatives. Raises: ValueError for what is no chat completion."""
        try:
            choice = given["choices"][0]
            text = choice["message"].get("content") or ""
            first = ((choice.get("logprobs") or {}).get("content") or [{}])[0]
            top = [(str(one["token"]), float(one["logprob"])) for one in first.get("top_logprobs") or []]
            return Answer(self._masked(str(text)), tuple(top))
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{self.to}: its answer is no chat completion; does the url end with /v1?") from error

    def _masked(self, text: str) -> str:
        """What is logged and kept shows no key."""
        return text.replace(self.to.key, "***") if self.to.key else text


def chat(endpoint: Endpoint | Chat) -> Chat:
    """What answers: the model at an endpoint, or the model itself."""
    return Served(endpoint) if isinstance(endpoint, Endpoint) else endpoint
