"""A reward that runs in another process or on another machine, asked over HTTP."""

from __future__ import annotations

import queue
import threading
import uuid
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

import torch

from flowalign.distributed import rank
from flowalign.media import FILES
from flowalign.records import Media, Prompts, Scores
from rewards.base import Card, Reward
from rewards.joined import join_scores
from rewards.payload import Request, decode_scores, encode_request
from rewards.wire import Address, address, ask, gather, hidden, read_secret, shown


class RemoteReward(Reward):
    """What a reward server says, from `flowalign serve` or any that speaks Flow-Factory's /compute; no gradient.

    Batches travel side by side and come back in order. A server that cannot be had, or whose answer is not what was
    asked for, stops the run with one line; no failure becomes a score. Scores that the server itself could not have are
    invalid. Sent are pictures, prompts, their metadata and groups, frames per second and references. Names of files
    among the metadata (`flowalign.media.FILES`) stay here: a server opens none, and a reward that does is local.

    The url comes from the config alone. No redirect is followed, no proxy used, and link-local and metadata addresses
    are refused. Over plain http the token and the pictures can be read on the way: use it on one machine or in a
    network of your own.

    Several servers of the same reward share the batches: each goes to one that is free. A server that cannot be had
    stops the run all the same, whatever the others do.

    Args:
        url: http(s)://host:port of the server, or a list of them. Of several each has to answer /health, as `flowalign
            serve` does, with the same name and hash of weights.
        token_file: holds the token that the server was started with.
        budget: seconds for one batch, its waiting and its retries included.
        retries: after errors of the connection and 5xx; a busy server is asked again as long as the budget lasts.
        batch_size: media per request; groups stay whole where the scope is "group".
        in_flight: requests under way at once at each server; of all servers together, micro-batches of a trainer that
            may wait for their scores.
        name: of the score among the parts; those that the server names are kept beside it.
        exact: send float32 in place of PNGs of 8 bits, which round to the nearest 1 / 255 and are a tenth as large.
        scope: what one score depends on, as the served reward's card says.
        weights: the beginning of the hash that each server's /health has to show, to score with these weights only.

    Raises: ValueError for settings out of range, a url that is none or comes twice. Scoring raises OSError where a
    server cannot be had within the budget, and ValueError where it refuses or answers something else.
    """

    def __init__(
        self,
        url: str | Sequence[str],
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
        urls = [url] if isinstance(url, str) else url
        self.servers = [
            address("reward server", one.removesuffix("/compute"), key, float(budget), retries) for one in urls
        ]
        if not urls or len({*self.servers}) < len(urls):
            raise ValueError(f"url: expected one or several servers, each once, got {urls!r:.200}")
        self.batch_size, self.exact, self.ahead = batch_size, exact, in_flight * len(urls)
        self._free = self._slots(in_flight)
        self.name, self.weights, self._checked = name, weights, not weights and len(urls) == 1
        self.told = ", ".join(map(str, self.servers))
        self.card = Card(weights=self.told, licence="that of the served reward", modality="any", scope=scope)

    def score(self, media: Media, prompts: Prompts) -> Scores:
        if not self._checked:
            self._check_health()
        batches = self._batches(prompts)
        asks = [partial(self._ask, media, prompts, index) for index in batches]
        joined = self._join(gather(asks, self.ahead))
        place = torch.tensor([row for index in batches for row in index]).argsort()
        device = media.pixels.device
        parts = {part: values[place].to(device) for part, values in joined.parts.items()}
        return Scores(joined.total[place].to(device), parts, joined.valid[place].to(device))

    def _ask(self, media: Media, prompts: Prompts, index: list[int], stop: threading.Event) -> Scores:
        name = uuid.uuid4().hex
        body = encode_request(Request(media.rows(index), without_files(prompts.rows(index)), name), self.exact)
        to = self._free.get()
        try:
            answer = ask(to, "/compute", body, stop)
        finally:
            self._free.put(to)
        try:
            return decode_scores(answer, len(index), self.name, name, self.card.scope, partial(hidden, to))
        except ValueError as error:
            raise ValueError(f"{to}: {error}") from error

    def _join(self, answers: Sequence[Scores]) -> Scores:
        named = {tuple(sorted(answer.parts)) for answer in answers}
        if len(named) > 1:
            told = hidden(self.servers[0], ", ".join(map(str, sorted(named))))
            raise ValueError(f"{self.told}: parts differ from batch to batch: {told}")
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

    def _slots(self, each: int) -> queue.Queue[Address]:
        """Servers that may be asked, each so many times, in turn; processes begin with different ones.

        The threads of all calls share them. The server that has been free for longest is asked next.
        """
        first = rank() % len(self.servers)
        slots: queue.Queue[Address] = queue.Queue()
        for one in each * (self.servers[first:] + self.servers[:first]):
            slots.put(one)
        return slots

    def _check_health(self) -> None:
        """Raises: ValueError where a server has other weights than those asked for, or than the first one has."""
        known: tuple[str, str] | None = None
        for to in self.servers:
            health = ask(to, "/health", None)
            name, found = (str(health.get(key, "")) if isinstance(health, dict) else "" for key in ("name", "weights"))
            if not found.startswith(self.weights):
                raise ValueError(f"{to}: serves weights {shown(to, found, 64)}, asked for {self.weights!r:.70}")
            known = known or (name, found)
            if (name, found) != known:
                told = f"{shown(to, name, 64)} with weights {shown(to, found, 64)}"
                first = f"{shown(to, known[0], 64)} with weights {shown(to, known[1], 64)}"
                raise ValueError(f"{to}: serves {told}, and {self.servers[0]} {first}; servers must serve the same")
        self._checked = True


def without_files(prompts: Prompts) -> Prompts:
    """Prompts whose metadata name no files; references are sent as pictures."""
    kept = ({key: value for key, value in row.items() if key not in FILES} for row in prompts.metadata)
    return replace(prompts, metadata=tuple(kept))
