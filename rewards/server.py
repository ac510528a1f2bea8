"""`flowalign serve`: any reward over HTTP, in an environment or on a machine of its own."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import hmac
import ipaddress
import json
import logging
import re
import socket
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from flowalign.config import ConfigError, build, load_yaml
from rewards.base import Reward, as_reward
from rewards.connections import server
from rewards.payload import Malformed, decode_request, encode_scores
from rewards.wire import read_secret

WAITING = 8  # requests that may wait, with their bodies, beside those that are scored
READ_SECONDS = 60.0  # for a body to arrive
SHORTEST_TOKEN = 16  # characters
_log = logging.getLogger("flowalign")


class _TooLarge(Exception):
    pass


class Service:
    """Answers GET /health and POST /compute for one reward.

    At most `concurrency` requests are scored at once, in threads, and eight more wait; others are told 503. A reward
    that is used by more than one thread has to bear that. Clients are told what is wrong with their request and nothing
    of the server: what its reward raises stands in its log, under the number that the client is given.

    Raises: ValueError for a reward that opens files which prompts name: a client could look into any of the server's.
    """

    def __init__(self, reward: Reward, token: str = "", max_bytes: int = 64 << 20, concurrency: int = 1) -> None:
        if max_bytes < 1 or concurrency < 1:
            raise ValueError(f"size and concurrency must be at least 1, got {max_bytes} and {concurrency}")
        if reward.card.opens_files:
            raise ValueError(
                f"{reward.name} opens files that prompts name, which a server does not for its clients: use it in the "
                "run itself, or in a process of its own there (rewards.OwnProcess)"
            )
        self.reward, self.token, self.max_bytes = reward, token.encode(), max_bytes
        self.concurrency, self._admitted = concurrency, 0
        self._slots = asyncio.Semaphore(concurrency)
        self._health = json.dumps(describe(reward)).encode()

    async def health(self, request: Any) -> Any:
        """The reward's name, card, hash of weights, and whether it has a gradient."""
        if not self._allowed(request):
            return _answer(401, _error("a token is needed"), close=True)
        return _answer(200, self._health)

    async def compute(self, request: Any) -> Any:
        """The scores of a request, or what is wrong with it."""
        refused = self._refused(request)
        if refused is not None:
            return refused
        self._admitted += 1
        try:
            return await self._scored(request)
        finally:
            self._admitted -= 1

    def _allowed(self, request: Any) -> bool:
        given = request.headers.get("authorization", "").encode("latin-1")
        return not self.token or hmac.compare_digest(given, b"Bearer " + self.token)

    def _refused(self, request: Any) -> Any:
        """What can be told from the headers alone, before the body is read; None where nothing is wrong."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        length = request.headers.get("content-length", "0")
        if not self._allowed(request):
            return _answer(401, _error("a token is needed"), close=True)
        if kind != "application/json":  # what a web page could send here without being asked is of another type
            return _answer(415, _error("the body must be application/json"), close=True)
        if not (length.isascii() and length.isdigit()) or len(length) > 15:
            return _answer(400, _error("content-length is no number"), close=True)
        if int(length) > self.max_bytes:
            return _answer(413, _error(f"at most {self.max_bytes} bytes"), close=True)
        if self._admitted >= self.concurrency + WAITING:
            return _answer(503, _error("busy"), close=True)
        return None

    async def _scored(self, request: Any) -> Any:
        from starlette.concurrency import run_in_threadpool
        from starlette.requests import ClientDisconnect

        try:
            async with asyncio.timeout(READ_SECONDS):
                raw = await self._body(request)
        except _TooLarge:
            return _answer(413, _error(f"at most {self.max_bytes} bytes"), close=True)
        except TimeoutError:
            return _answer(408, _error("the body took too long"), close=True)
        except ClientDisconnect:
            return _answer(400, _error("the body ended early"), close=True)
        async with self._slots:
            status, body = await run_in_threadpool(self.work, raw)
        return _answer(status, body)

    async def _body(self, request: Any) -> bytes:
        """All of the body; one without a length is counted as it comes."""
        parts, size = [], 0
        async for part in request.stream():
            size += len(part)
            if size > self.max_bytes:
                raise _TooLarge
            parts.append(part)
        return b"".join(parts)

    def work(self, raw: bytes) -> tuple[int, bytes]:
        """Status and body of the answer to a body."""
        try:
            asked = decode_request(raw)
        except Malformed as error:
            return 400, _error(str(error))
        number = uuid.uuid4().hex[:8]
        try:
            scores = self.reward(asked.media, asked.prompts)
            if not len(asked.media) == len(scores.valid) == len(scores.total):
                raise RuntimeError(f"{len(scores)} scores for {len(asked.media)} media")
            return 200, encode_scores(scores, asked.id, self.reward.card.scope)
        except ValueError:  # of what was sent: another size, no metadata, videos for pictures
            _log.warning("%s: the reward refused a request", number, exc_info=True)
            return 422, _error(f"the reward refuses this input; the server's log says why, under {number}")
        except Exception:  # whatever a reward raises, the server goes on
            _log.error("%s: the reward failed", number, exc_info=True)
            return 500, _error(f"the reward failed; the server's log says why, under {number}")


def _error(message: str) -> bytes:
    return json.dumps({"error": message}).encode()


def _answer(status: int, body: bytes, close: bool = False) -> Any:
    from starlette.responses import Response

    headers = {"X-Content-Type-Options": "nosniff"} | ({"Connection": "close"} if close else {})
    return Response(body, status, headers, media_type="application/json")


def describe(reward: Reward) -> dict[str, Any]:
    """What /health says of a reward; "weights" is the SHA-256 of all its torch modules, "" where it has none."""
    card = dataclasses.asdict(reward.card)
    modules = [*_modules(reward, set())]
    digest = hashlib.sha256()
    for module in modules:
        for name, value in module.state_dict().items():
            if isinstance(value, torch.Tensor):
                digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
                digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    weights = digest.hexdigest() if modules else ""
    known = {"name": reward.name, "card": card, "differentiable": reward.differentiable, "weights": weights}
    return {"status": "ok", **known}


def _modules(value: Any, seen: set[int]) -> Iterator[torch.nn.Module]:
    """The torch modules that a reward, or one of its terms, holds; by attribute, in the order of their names."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, torch.nn.Module):
        yield value
    elif isinstance(value, Reward):
        for _, held in sorted(vars(value).items()):
            yield from _modules(held, seen)
    elif isinstance(value, list | tuple):
        for held in value:
            yield from _modules(held, seen)


def make_app(service: Service) -> Any:
    """The service as an ASGI application (FastAPI), without its pages of documentation.

    Raises: ValueError without the extra.
    """
    try:
        from fastapi import FastAPI
        from starlette.routing import Route
    except ImportError as error:
        raise ValueError(f"serve needs the extra: pip install 'flowalign-diffusion[serve]' ({error})") from error
    health = Route("/health", service.health, methods=["GET"])
    compute = Route("/compute", service.compute, methods=["POST"])
    return FastAPI(routes=[health, compute], docs_url=None, redoc_url=None, openapi_url=None)


def _served(reward: Reward | Callable[..., Any]) -> Reward:
    return as_reward(reward)


def read_reward(text: str, allow_code: bool = False) -> Reward:
    """The reward of a dotted path or an expression, or of a YAML file: a class with arguments, or its key `reward`.

    Raises: ValueError
    """
    if not text.endswith((".yaml", ".yml")):
        return make_reward(text, allow_code)
    config = load_yaml(Path(text))
    if "class" not in config and "reward" not in config:
        raise ConfigError(f"{text}: expected 'class: dotted.path' and its arguments, or the key 'reward'")
    try:
        return make_reward(config if "class" in config else config["reward"], allow_code)
    except ValueError as error:
        raise ConfigError(f"{text}: {error}") from error


def make_reward(named: Any, allow_code: bool = False) -> Reward:
    """The reward of a dotted path, an expression, or a class with its arguments. Raises: ValueError"""
    if isinstance(named, str) and not re.fullmatch(r"\w+(\.\w+)+", named):
        return as_reward(named)
    reward: Reward = build(_served, {"reward": named}, allow_code)
    return reward


def read_token(host: str, token_file: str | None) -> str:
    """The token. Raises: ConfigError where other machines could ask without one, or it can be guessed."""
    if token_file is None:
        if not _is_loopback(host):
            raise ConfigError(f"--host {host} can be reached by other machines: give --token-file FILE")
        return ""
    token = read_secret(token_file, "--token-file")
    if len(token) < SHORTEST_TOKEN:
        raise ConfigError(f"--token-file: the token in {token_file} has less than {SHORTEST_TOKEN} characters")
    return token


def _is_loopback(host: str) -> bool:
    try:
        found = socket.getaddrinfo(host, None)
    except OSError as error:
        raise ConfigError(f"--host {host}: no such address ({error.strerror})") from error
    return all(ipaddress.ip_address(str(one[4][0]).partition("%")[0]).is_loopback for one in found)


def run(
    reward: str,
    host: str = "127.0.0.1",
    port: int = 8700,
    token_file: str | None = None,
    max_mb: int = 64,
    concurrency: int = 1,
    allow_code: bool = False,
) -> None:
    """Serve until a signal. Raises: ConfigError, or OSError where the port is taken."""
    token = read_token(host, token_file)
    if not 0 <= port <= 65535 or max_mb < 1 or concurrency < 1:
        raise ConfigError(f"--port, --max-mb and --concurrency: {port}, {max_mb} and {concurrency} are out of range")
    if allow_code and "" not in sys.path:
        sys.path.append(str(Path.cwd()))  # at the end: the user's modules are found, and hide none of ours
    app = make_app(Service(read_reward(reward, allow_code), token, max_mb << 20, concurrency))
    family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    try:
        bound = socket.create_server((host, port), family=family)
    except OSError as error:
        raise OSError(f"--port {port} of {host} cannot be had: {error.strerror}") from error
    shown = f"[{host}]" if ":" in host else host
    print(f"serving {reward} at http://{shown}:{bound.getsockname()[1]}", flush=True)
    try:
        server(app).run(sockets=[bound])
    finally:
        bound.close()
