"""The reward server: what it answers, what it refuses, and 10,000 broken bodies. Asked as ASGI, and once for real."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import logging
import os
import random
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from flowalign.cli import main
from flowalign.config import ConfigError
from flowalign.records import Media, Prompts, Scores
from rewards import connections
from rewards.algebra import Clip
from rewards.base import Card, Reward, WeightedSum, simple_scores
from rewards.consistency import EdgeConsistency
from rewards.frames import OnFrames
from rewards.jpeg import JPEGCompressibility
from rewards.payload import Request, encode_request
from rewards.remote import RemoteReward
from rewards.server import WAITING, Service, describe, make_app, read_reward, read_token, run

pytest.importorskip("fastapi", reason="the extra [serve]")
pytest.importorskip("uvicorn", reason="the extra [serve]")

ROOT = Path(__file__).resolve().parents[1]
TOKEN = "canary-0123456789abcdef"
KIND = (b"content-type", b"application/json")


class Brightness(Reward):
    """The mean of each picture, in two parts; prompts name faults."""

    name = "brightness"
    card = Card(modality="any", usual=(0, 1))

    def score(self, media: Media, prompts: Prompts) -> Scores:
        if "refuse" in prompts.text:
            raise ValueError("/secret/path is not there")
        if "crash" in prompts.text:
            raise RuntimeError("/secret/path broke")
        total = media.pixels.flatten(1).mean(1)
        total = total.where(torch.tensor([text != "nan" for text in prompts.text]), torch.nan)
        return simple_scores(self.name, total, {"red": media.pixels.flatten(1).amax(1)})


def body(count: int = 2, size: int = 4, *texts: str, exact: bool = False) -> bytes:
    pixels = torch.linspace(0, 1, count * 3 * size * size).reshape(count, 3, size, size)
    texts = texts or tuple(f"prompt {i}" for i in range(count))
    return encode_request(Request(Media(pixels), Prompts(texts, ({},) * count), "me"), exact)


async def exchange(
    app: Any, path: str, parts: list[bytes], headers: list[tuple[bytes, bytes]], method: str = "POST"
) -> tuple[int, dict[str, str], bytes, int]:
    """Status, headers and body of an answer, and how many parts of the body were read for it."""
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "path": path,
        "raw_path": path.encode(), "root_path": "", "scheme": "http", "query_string": b"", "headers": headers,
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80),
    }  # fmt: skip
    read, sent = 0, []

    async def receive() -> dict[str, Any]:
        nonlocal read
        read += 1
        more = read < len(parts)
        return {"type": "http.request", "body": parts[read - 1] if read <= len(parts) else b"", "more_body": more}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await app(scope, receive, send)
    given = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], given, b"".join(message.get("body", b"") for message in sent[1:]), read


def post(raw: bytes, *headers: tuple[bytes, bytes], service: Service | None = None, path: str = "/compute") -> Any:
    app = make_app(service or Service(Brightness()))
    status, _, answer, _ = asyncio.run(exchange(app, path, [raw], [KIND, *headers]))
    return status, json.loads(answer)


@pytest.mark.parametrize("exact", [False, True])
def test_scores_are_the_rewards(exact: bool) -> None:
    status, answer = post(body(5, exact=exact))
    expected = torch.linspace(0, 1, 5 * 48).reshape(5, -1)
    assert status == 200
    assert (answer["id"], answer["valid"]) == ("me", [True] * 5)
    torch.testing.assert_close(torch.tensor(answer["rewards"]), expected.mean(1), rtol=0, atol=1e-6 if exact else 2e-3)
    assert answer["scope"] == "sample"
    assert [*answer["parts"]] == ["brightness", "red"]
    torch.testing.assert_close(torch.tensor(answer["parts"]["red"]), expected.amax(1), rtol=0, atol=2e-3)


def test_what_is_not_finite_is_null_and_invalid() -> None:
    status, answer = post(body(3, 4, "a", "nan", "b"))
    assert status == 200
    assert answer["valid"] == [True, False, True]
    assert answer["rewards"][1] is None
    assert answer["parts"]["brightness"][1] is None


@pytest.mark.parametrize(("text", "expected"), [("refuse", 422), ("crash", 500)])
def test_what_a_reward_raises_stays_here(text: str, expected: int, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "flowalign"):
        status, answer = post(body(1, 4, text))
    assert status == expected
    assert "secret" not in json.dumps(answer)
    number = answer["error"].split()[-1]
    assert number in caplog.text, "the client's number leads to the traceback"
    assert "/secret/path" in caplog.text


def test_health_and_hash() -> None:
    class Weighted(Brightness):
        def __init__(self) -> None:
            self.model = torch.nn.Linear(2, 3)
            self.model.register_buffer("count", torch.tensor(7, dtype=torch.int64))

    reward = Weighted()
    app = make_app(Service(reward))
    status, _, answer, _ = asyncio.run(exchange(app, "/health", [], [], "GET"))
    known = json.loads(answer)
    assert status == 200
    assert (known["name"], known["differentiable"], known["card"]["usual"]) == ("brightness", False, [0, 1])
    digest = hashlib.sha256()
    for name, value in reward.model.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode() + value.numpy().tobytes())
    assert known["weights"] == digest.hexdigest()
    assert describe(WeightedSum([reward], [2.0]))["weights"] == known["weights"], "terms are looked into"
    reward.model.bias.data[0] += 1e-3
    assert describe(reward)["weights"] != known["weights"]
    assert describe(Brightness())["weights"] == ""


@pytest.mark.parametrize("path", ["/health", "/compute"])
def test_token(path: str) -> None:
    service, method = Service(Brightness(), TOKEN), "GET" if path == "/health" else "POST"
    for given, expected in (
        ([], 401),
        ([(b"authorization", b"Bearer " + TOKEN[:-1].encode())], 401),
        ([(b"authorization", b"Bearer \xff\xfe")], 401),
        ([(b"authorization", TOKEN.encode())], 401),
        ([(b"authorization", f"Bearer {TOKEN}".encode())], 200),
    ):
        app = make_app(service)
        status, _, answer, read = asyncio.run(exchange(app, path, [body()], [KIND, *given], method))
        assert status == expected
        assert TOKEN.encode() not in answer
        assert read == (1 if expected == 200 and method == "POST" else 0), "nothing is read of who has no token"


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ([KIND, (b"content-length", b"5001")], 413),
        ([KIND, (b"content-length", b"9" * 400)], 400),
        ([KIND, (b"content-length", b"-1")], 400),
        ([(b"content-type", b"text/plain")], 415),
        ([], 415),
    ],
)
def test_refused_before_the_body_is_read(headers: list[tuple[bytes, bytes]], expected: int) -> None:
    app = make_app(Service(Brightness(), max_bytes=5000))
    status, given, _, read = asyncio.run(exchange(app, "/compute", [body()], headers))
    assert (status, read) == (expected, 0)
    assert given["connection"] == "close"


def test_a_body_without_length_is_counted_as_it_comes() -> None:
    app = make_app(Service(Brightness(), max_bytes=5000))
    status, _, _, read = asyncio.run(exchange(app, "/compute", [b"x" * 1000] * 100, [KIND]))
    assert (status, read) == (413, 6)
    whole = body(1)
    parts = [whole[start : start + 7] for start in range(0, len(whole), 7)]
    assert asyncio.run(exchange(app, "/compute", parts, [KIND]))[0] == 200


def test_concurrency() -> None:
    """Two at once, eight more wait, and the rest is told so at once."""
    lock, now, most = threading.Lock(), [0], [0]

    class Slow(Brightness):
        def score(self, media: Media, prompts: Prompts) -> Scores:
            with lock:
                now[0] += 1
                most[0] = max(most[0], now[0])
            time.sleep(0.02)
            with lock:
                now[0] -= 1
            return super().score(media, prompts)

    async def together() -> list[int]:
        app = make_app(Service(Slow(), concurrency=2))
        found = await asyncio.gather(*(exchange(app, "/compute", [body()], [KIND]) for _ in range(15)))
        again = await exchange(app, "/compute", [body()], [KIND])
        return [one[0] for one in (*found, again)]

    statuses = asyncio.run(together())
    assert most[0] == 2
    assert statuses == [200] * (2 + WAITING) + [503] * (15 - 2 - WAITING) + [200]


def test_a_body_that_does_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rewards.server.READ_SECONDS", 0.05)
    service = Service(Brightness())

    async def stuck() -> int:
        app, sent = make_app(service), []

        async def receive() -> dict[str, Any]:
            await asyncio.sleep(10)
            return {}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/compute", "headers": [KIND], "query_string": b""}
        await app(scope, receive, send)
        return int(sent[0]["status"])

    assert asyncio.run(stuck()) == 408
    assert service._admitted == 0


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def crafted(width: int, height: int, extra: bytes = b"", depth: int = 8, colours: int = 2) -> str:
    """A PNG that says it has this size; its pixels are nearly none."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colours, 0, 0, 0))
    file = b"\x89PNG\r\n\x1a\n" + head + extra + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    return base64.b64encode(file).decode()


GOOD = json.loads(body())
RAW = {"shape": [2, 3, 2, 2], "dtype": "uint8", "data": base64.b64encode(bytes(24)).decode()}
BOMB = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(80_000_000), 9))
MALFORMED: list[tuple[str, bytes | dict[str, Any], str]] = [
    ("not json", b"{", "no JSON"),
    ("latin-1", b'{"prompt": ["\xe9"]}', "no JSON in UTF-8"),
    ("nested", b"[" * 200_000, "no JSON"),
    ("a pickle", b"\x80\x04\x95\x1f\x00.", "no JSON"),
    ("a list", b"[]", "must be an object"),
    ("no prompt", {"image": GOOD["image"]}, "prompt must be a list"),
    ("prompt of a number", GOOD | {"prompt": [1, "a"]}, "prompt must be a list of texts"),
    ("half a surrogate", json.dumps(GOOD | {"prompt": ["a", "\ud800"]}).encode(), "prompt must be a list of texts"),
    ("long prompt", GOOD | {"prompt": ["a", "x" * 100_001]}, "prompt must be a list of texts"),
    ("many prompts", GOOD | {"prompt": ["a"] * 5000}, "at most 4096"),
    ("fewer prompts", GOOD | {"prompt": ["a"]}, "2 media but 1 prompts"),
    ("nothing to look at", {"prompt": ["a"]}, "exactly one of image, video and tensor"),
    ("two kinds", GOOD | {"tensor": RAW}, "exactly one"),
    ("no base64", GOOD | {"image": ["!", "!"]}, "must be base64"),
    ("not ascii", GOOD | {"image": ["\u00e9", "!"]}, "must be base64"),
    ("no text", GOOD | {"image": [1, 2]}, "must be base64"),
    ("a gif", GOOD | {"image": [base64.b64encode(b"GIF89a" + bytes(20)).decode()] * 2}, "is no PNG"),
    ("70,000 x 70,000", GOOD | {"image": [crafted(70_000, 70_000)] * 2}, "PNG"),
    ("9,000 x 9,000", GOOD | {"image": [crafted(9000, 9000)] * 2}, "too large"),
    ("too many pixels in all", GOOD | {"prompt": ["a"] * 40, "image": [crafted(2000, 2000)] * 40}, "too large for 40"),
    ("cut off", GOOD | {"image": [crafted(64, 64)] * 2}, "PNG is broken"),
    ("16 bits", GOOD | {"image": [crafted(2, 2, depth=16, colours=0)] * 2}, "8 bits a channel"),
    ("text bomb", GOOD | {"image": [crafted(2, 2, BOMB)] * 2}, "PNG"),
    ("two sizes", GOOD | {"image": [GOOD["image"][0], json.loads(body(1, 5))["image"][0]]}, "all have one size"),
    ("videos of two lengths", {"prompt": ["a", "b"], "video": [["x"], ["x", "y"]]}, "same number of frames"),
    ("empty video", {"prompt": ["a"], "video": [[]]}, "there is no picture"),
    ("tensor of two axes", {"prompt": ["a"], "tensor": RAW | {"shape": [2, 3]}}, "needs a shape"),
    ("negative shape", {"prompt": ["a"], "tensor": RAW | {"shape": [-2, 3, -2, 2]}}, "needs a shape"),
    ("huge shape", {"prompt": ["a"], "tensor": RAW | {"shape": [2**40, 3, 2**40, 2**40]}}, "needs 3 channels"),
    ("true shape", {"prompt": ["a"], "tensor": RAW | {"shape": [True, 3, 2, 2]}}, "needs a shape"),
    ("object dtype", {"prompt": ["a"], "tensor": RAW | {"dtype": "object"}}, "one of the dtypes"),
    ("data too short", {"prompt": ["a", "b"], "tensor": RAW | {"dtype": "float32"}}, "not as many"),
    ("metadata", GOOD | {"metadata": [1, 2]}, "list of objects"),
    ("a file", GOOD | {"metadata": [{}, {"media": "/etc/hostname"}]}, 'may not hold "media": no files are opened'),
    ("a file to look at", GOOD | {"metadata": [{"image": "a.png"}, {}]}, 'may not hold "image"'),
    ("files", GOOD | {"metadata": [{"references": ["/etc/hostname"]}, {}]}, 'may not hold "references"'),
    ("one metadata", GOOD | {"metadata": [{}]}, "an entry for each of 2"),
    ("groups", GOOD | {"groups": [0.5, 1]}, "whole numbers"),
    ("huge group", GOOD | {"groups": [2**64, 1]}, "whole numbers"),
    ("fps", GOOD | {"fps": -1}, "fps must be"),
    ("id", GOOD | {"id": "x" * 65}, "id must be"),
    ("references", GOOD | {"condition_images": [["x"]]}, "an entry for each of 2"),
    ("condition videos", GOOD | {"condition_videos": [["x"], None]}, "condition_videos are not taken"),
    ("condition number", GOOD | {"condition_videos": 7}, "condition_videos are not taken"),
]


@pytest.mark.parametrize(("name", "sent", "line"), MALFORMED, ids=[one[0] for one in MALFORMED])
def test_malformed(name: str, sent: bytes | dict[str, Any], line: str) -> None:
    status, answer = post(sent if isinstance(sent, bytes) else json.dumps(sent).encode())
    assert status == 400
    assert line in answer["error"]
    assert len(answer["error"]) < 120


def test_other_paths_and_methods() -> None:
    app = make_app(Service(Brightness()))
    for path, method, expected in (
        ("/", "GET", 404),
        ("/docs", "GET", 404),
        ("/openapi.json", "GET", 404),
        ("/compute", "GET", 405),
        ("/compute/../health", "GET", 404),
    ):
        assert asyncio.run(exchange(app, path, [], [], method))[0] == expected


def mutants(count: int) -> Iterator[bytes]:
    """Bodies with bytes flipped, cut, doubled or put in, and with values swapped for others of any kind."""
    rng = random.Random(1)
    values = [None, True, -1, 0, 2**70, 1e308, "", "a", [], {}, [[]], [None], "\ud800", GOOD["image"][0], RAW]
    seeds = [
        GOOD,
        {"prompt": ["a", "b"], "tensor": RAW},
        GOOD | {"metadata": [{"a": 1}, {}], "groups": [1, 2], "fps": 8},
    ]
    seeds.append({"prompt": ["a"], "video": [GOOD["image"]], "condition_images": [GOOD["image"]]})
    for number in range(count):
        tree = json.loads(json.dumps(rng.choice(seeds)))
        if number % 2:
            swap(tree, rng, values)
        raw = bytearray(json.dumps(tree).encode())
        for _ in range(rng.choice((0, 0, 0, 1)) if number % 2 else rng.randint(1, 4)):
            at = rng.randrange(len(raw) + 1)
            kind = rng.randrange(4)
            if kind == 0 and at < len(raw):
                raw[at] ^= 1 << rng.randrange(8)
            elif kind == 1:
                del raw[at : at + rng.randint(1, 40)]
            elif kind == 2:
                raw[at:at] = raw[at : at + rng.randint(1, 40)]
            else:
                raw[at:at] = rng.choice((b"\0", b"\xff", b"[", b"}", b'"', b"NaN", b"1e999", b"\\u0000", b"=", b"A"))
        yield bytes(raw)


def swap(tree: Any, rng: random.Random, values: list[Any]) -> None:
    """One value somewhere in a tree for another."""
    keys = [*tree] if isinstance(tree, dict) else [*range(len(tree))]
    key = rng.choice(keys)
    if isinstance(tree[key], dict | list) and tree[key] and rng.random() < 0.7:
        swap(tree[key], rng, values)
    elif rng.random() < 0.2:
        del tree[key]
    else:
        tree[key] = rng.choice(values)


def test_ten_thousand_mutated_bodies() -> None:
    """None brings the server down, none is a 5xx, what is scored has as many scores as prompts."""
    app = make_app(Service(Brightness()))

    async def all_of_them() -> dict[int, int]:
        counts: dict[int, int] = {}
        for raw in mutants(10_000):
            status, _, answer, _ = await exchange(app, "/compute", [raw], [KIND])
            counts[status] = counts.get(status, 0) + 1
            known = json.loads(answer)
            assert len(known["rewards"]) == len(json.loads(raw)["prompt"]) if status == 200 else known["error"]
        return counts

    counts = asyncio.run(all_of_them())
    assert set(counts) <= {200, 400, 422}
    assert min(counts[200], counts[400]) > 500, "the mutants reach both ends"


def test_a_reward_that_opens_what_prompts_name_is_not_served(capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever it is wrapped in; else a client could look into any picture of the server's."""
    edges = EdgeConsistency()
    for reward in (edges, 2 * edges - JPEGCompressibility(), OnFrames(edges), Clip(edges, -1, 0)):
        with pytest.raises(ValueError, match=r"opens files that prompts name, .* use it in the run itself"):
            Service(reward)
    assert main(["serve", "rewards.EdgeConsistency", "--port", "0"]) == 2
    assert capsys.readouterr().err.startswith("flowalign: error: edge_consistency opens files that prompts name")


def test_read_reward(tmp_path: Path) -> None:
    assert isinstance(read_reward("rewards.JPEGCompressibility"), JPEGCompressibility)
    file = tmp_path / "reward.yaml"
    file.write_text("class: rewards.WeightedSum\nrewards: [rewards.JPEGCompressibility]\nweights: [2]\n")
    assert isinstance(read_reward(str(file)), WeightedSum)
    file.write_text("reward: rewards.JPEGCompressibility\nmodel: anything\n")
    assert isinstance(read_reward(str(file)), JPEGCompressibility), "of a training config"
    for text, line in (("a: 1", "expected 'class: dotted.path'"), ("class: rewards.Nope", "no 'Nope' in rewards")):
        file.write_text(text)
        with pytest.raises(ConfigError, match=line):
            read_reward(str(file))
    with pytest.raises(ConfigError, match="code from outside"):
        read_reward("os.system")
    with pytest.raises(ValueError, match="nope"):
        read_reward("2 * nope + 1")


def test_who_may_ask(tmp_path: Path) -> None:
    assert read_token("127.0.0.1", None) == read_token("localhost", None) == ""
    for host in ("0.0.0.0", "192.0.2.1", "::"):
        with pytest.raises(ConfigError, match=f"--host {host} can be reached by other machines: give --token-file"):
            run("rewards.JPEGCompressibility", host)
    file = tmp_path / "token"
    file.write_text("short")
    with pytest.raises(ConfigError, match="less than 16 characters"):
        read_token("0.0.0.0", str(file))
    file.write_text(TOKEN + "\n")
    assert read_token("0.0.0.0", str(file)) == TOKEN
    with pytest.raises(ConfigError, match="are out of range"):
        run("rewards.JPEGCompressibility", port=-1)
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(OSError, match=r"--port \d+ of 127.0.0.1 cannot be had: Address already in use"),
    ):
        run("rewards.JPEGCompressibility", port=taken.getsockname()[1])


@contextmanager
def started(tmp_path: Path, *words: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    command = [sys.executable, "-m", "flowalign", "serve", "rewards.JPEGCompressibility", "--port", "0", *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=-1, stderr=-1, text=True)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().split()[-1], process
    finally:
        process.kill()
        process.communicate()


def test_command_and_client(tmp_path: Path) -> None:
    """A process of its own behind uvicorn: the same scores as here, tokens, too large a body, and Ctrl-C."""
    (tmp_path / "token").write_text(TOKEN)
    media, prompts = Media(torch.rand(7, 3, 16, 16)), Prompts(("a",) * 7, ({},) * 7)
    ask: Callable[..., RemoteReward] = RemoteReward
    with started(tmp_path, "--token-file", "token", "--max-mb", "1") as (url, process):
        reward = ask(url, str(tmp_path / "token"), batch_size=2, budget=20.0)
        expected = JPEGCompressibility()(media, prompts)
        found = reward(media, prompts)
        assert torch.equal(found.total, expected.total)
        assert {*expected.parts, "remote"} == {*found.parts}
        with pytest.raises(ValueError, match=r"refuses the token \(401\); give the token"):
            ask(url, budget=5.0)(media, prompts)
        with pytest.raises(ValueError, match=r"larger than it takes \(413\)"):
            ask(url, str(tmp_path / "token"), budget=5.0, exact=True)(Media(torch.rand(7, 3, 300, 300)), prompts)
        assert torch.equal(reward(media, prompts).total, expected.total), "it goes on"
        process.send_signal(2)
        out, errors = process.communicate(timeout=10)
        assert (process.returncode, out, errors) in ((0, "", ""), (130, "", "flowalign: stopped\n"))


@contextmanager
def listening(service: Service) -> Iterator[tuple[str, int]]:
    """Its address, in a thread of this process."""
    with socket.create_server(("127.0.0.1", 0)) as bound:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # and of all that it accepts
        server = connections.server(make_app(service))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
        thread.start()
        try:
            yield bound.getsockname()
        finally:
            server.should_exit = True
            thread.join(20)


def ended(held: socket.socket) -> bool:
    """Whether the other side hangs up, within ten seconds, and what it may have said before."""
    held.settimeout(10)
    try:
        while held.recv(4096):
            pass
    except TimeoutError:
        return False
    except ConnectionResetError:
        pass
    return True


def asked(held: socket.socket, path: str = "/health") -> bytes:
    """The beginning of the answer."""
    held.settimeout(10)
    held.sendall(f"GET {path} HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {TOKEN}\r\n\r\n".encode())
    return held.recv(12)


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET /health HTTP/1.1\r\nHost: a\r\n",
        b"GET /nowhere HTTP/1.1\r\nHost: a\r\n\r\nGET /health",
        b"POST /nowhere HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\nabc",
    ],
    ids=["silent", "half a header", "half a second request", "half a body that nobody reads"],
)
def test_a_connection_that_asks_nothing_is_closed(sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "IDLE_SECONDS", 0.3)
    with listening(Service(Brightness(), TOKEN)) as place, socket.create_connection(place) as held:
        held.sendall(sent)
        assert ended(held)


def flood(held: socket.socket) -> None:
    """Ask on and on, and take no answer."""
    while True:
        held.sendall(b"GET /nowhere HTTP/1.1\r\nHost: a\r\n\r\n" * 100)


def test_answers_that_nobody_fetches_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor the connection, once the buffers on the way are full."""
    monkeypatch.setattr(connections, "IDLE_SECONDS", 0.3)
    with listening(Service(Brightness(), TOKEN)) as place, socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        held.settimeout(10)
        held.connect(place)
        with pytest.raises(ConnectionError):  # TimeoutError where all wait for each other
            flood(held)


def test_a_request_may_be_worked_at_for_longer_than_a_connection_may_be_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "IDLE_SECONDS", 0.3)

    class Slow(Brightness):
        def score(self, media: Media, prompts: Prompts) -> Scores:
            time.sleep(0.7)
            return super().score(media, prompts)

    with listening(Service(Slow())) as (host, port):
        reward = RemoteReward(f"http://{host}:{port}", budget=20.0)
        assert reward(Media(torch.rand(1, 3, 4, 4)), Prompts(("a",), ({},))).valid.all()


def test_idle_connections_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest first: who connects late and asks at once is answered, whatever others hold open."""
    monkeypatch.setattr(connections, "MOST", 5)
    with listening(Service(Brightness(), TOKEN)) as place:
        held = [socket.create_connection(place) for _ in range(12)]
        try:
            with socket.create_connection(place) as late:
                assert asked(late) == b"HTTP/1.1 200"
                assert all(ended(one) for one in held[:8])
                assert asked(held[8]) == b"HTTP/1.1 200"
        finally:
            for one in held:
                one.close()
