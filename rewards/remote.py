"""A reward that runs in another process or on another machine, asked over HTTP."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch

from flowalign.records import Media, Prompts, Scores
from rewards.base import Card, Reward, join_scores
from rewards.payload import Request, decode_scores, encode_request
from rewards.wire import address, ask, gather, read_secret, shown


class RemoteReward(Reward):
    """What a reward server says, from `flowalign serve` or any that speaks Flow-Factory's /compute; no gradient.

    Batches travel side by side and come back in order. A server that cannot be had, or whose answer is not what was
    asked for, stops the run with one line; no failure becomes a score. Scores that the server itself could not have are
    invalid. Sent are pictures, prompts, their metadata and groups, frames per second and references.

    The url comes from the config alone. No redirect is followed, no proxy used, and link-local and metadata addresses
    are refused. Over plain http the token and the pictures can be read on the way: use it on one machine or in a
    network of your own.

    Args:
        url: http(s)://host:port of the server.
        token_file: holds the token that the server was started with.
        budget: seconds for one batch, its waiting and its retries included.
        retries: after errors of the connection and 5xx; a busy server is asked again as long as the budget lasts.
        batch_size: media per request; groups stay whole where the scope is "group".
        in_flight: requests under way at once, and micro-batches of a trainer that may wait for their scores.
        name: of the score among the parts; those that the server names are kept beside it.
        exact: send float32 in place of PNGs of 8 bits, which round to the nearest 1 / 255 and are a tenth as large.
        scope: what one score depends on, as the served reward's card says.
        weights: the beginning of the hash that the server's /health has to show, to score with these weights only.

    Raises: ValueError for settings out of range and a url that is none. Scoring raises OSError where the server cannot
    be had within the budget, and ValueError where it refuses or answers something else.
    """

    def __init__(
        self,
        url: str,
        token_file: str | None = None,
        budget: float = 60.0,
        retries: int = 5,
        batch_size: int = 32,
        in_flight: int = 4,
        name: str = "remote",
        exact: bool = False,
        scope: Literal["sample", "group", "set"] = "sample",
        weights: str = "",
    ) -> None:
        if batch_size < 1 or in_flight < 1:
            raise ValueError(f"batch_size and in_flight must be at least 1, got {batch_size} and {in_flight}")
        key = read_secret(token_file, "token_file") if token_file else ""
        self.to = address("reward server", url.removesuffix("/compute"), key, float(budget), retries)
        self.batch_size, self.in_flight, self.exact = batch_size, in_flight, exact
        self.ahead, self._slots = in_flight, threading.Semaphore(in_flight)  # which the threads of all calls share
        self.name, self.weights, self._checked = name, weights, not weights
        self.card = Card(weights=f"{self.to}", licence="that of the served reward", modality="any", scope=scope)

    def score(self, media: Media, prompts: Prompts) -> Scores:
        if not self._checked:
            self._check_weights()
        batches = self._batches(prompts)
        asks = [partial(self._ask, media, prompts, index) for index in batches]
        joined = self._join(gather(asks, self.in_flight))
        place = torch.tensor([row for index in batches for row in index]).argsort()
        device = media.pixels.device
        parts = {part: values[place].to(device) for part, values in joined.parts.items()}
        return Scores(joined.total[place].to(device), parts, joined.valid[place].to(device))

    def _ask(self, media: Media, prompts: Prompts, index: list[int], stop: threading.Event) -> Scores:
        name = uuid.uuid4().hex
        body = encode_request(Request(media.rows(index), prompts.rows(index), name), self.exact)
        with self._slots:
            answer = ask(self.to, "/compute", body, stop)
        try:
            return decode_scores(answer, len(index), self.name, name)
        except ValueError as error:
            raise ValueError(f"{self.to}: {error}") from error

    def _join(self, answers: Sequence[Scores]) -> Scores:
        named = {tuple(sorted(answer.parts)) for answer in answers}
        if len(named) > 1:
            raise ValueError(f"{self.to}: its parts differ from batch to batch: {', '.join(map(str, sorted(named)))}")
        return join_scores(answers)

    def _batches(self, prompts: Prompts) -> list[list[int]]:
        """Which rows go together: at most `batch_size`, but whole groups, or all, where a score depends on them."""
        if self.card.scope == "set":
            return [list(range(len(prompts)))]
        units: dict[int, list[int]] = {}
        by_group = self.card.scope == "group" and prompts.groups is not None
        for row, group in enumerate(prompts.groups if by_group and prompts.groups else range(len(prompts))):
            units.setdefault(group, []).append(row)
        batches: list[list[int]] = [[]]
        for unit in units.values():
            if batches[-1] and len(batches[-1]) + len(unit) > self.batch_size:
                batches.append([])
            batches[-1] += unit
        return batches

    def _check_weights(self) -> None:
        """Raises: ValueError where the server has other weights than those asked for."""
        health = ask(self.to, "/health", None)
        found = str(health.get("weights", "")) if isinstance(health, dict) else ""
        if not found.startswith(self.weights):
            raise ValueError(f"{self.to}: serves weights {shown(self.to, found, 64)}, asked for {self.weights!r:.70}")
        self._checked = True
