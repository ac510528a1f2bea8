"""The client of a reward server against a real server that misbehaves, and against ours."""

from __future__ import annotations

import base64
import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flowalign.records import Media, Prompts
from rewards.payload import Request, decode_request, encode_request
from rewards.remote import RemoteReward
from rewards.wire import address, check_ip, read_secret

Handle = Callable[[BaseHTTPRequestHandler, dict], None]
SECRET = "canary-0123456789abcdef"


@contextmanager
def served(handle: Handle) -> Iterator[tuple[str, list[dict]]]:
    """A server on loopback, and the requests that it has seen."""
    seen: list[dict] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers["Content-Length"]))
            seen.append({"path": self.path, "headers": dict(self.headers), "body": json.loads(raw)})
            handle(self, seen[-1]["body"])

        def do_GET(self) -> None:
            seen.append({"path": self.path, "headers": dict(self.headers), "body": {}})
            handle(self, {})

        def log_message(self, *words: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", seen
    finally:
        server.shutdown()
        server.server_close()


def reply(handler: BaseHTTPRequestHandler, status: int, body: bytes | dict, **headers: str) -> None:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(raw)))
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(raw)


def brightness(file: str) -> float:
    return float(np.asarray(Image.open(io.BytesIO(base64.b64decode(file)))).mean() / 255)


def honest(handler: BaseHTTPRequestHandler, body: dict) -> None:
    """Flow-Factory's protocol and no more: the brightness of each picture."""
    reply(handler, 200, {"rewards": [brightness(file) for file in body["image"]]})


def batch(count: int, groups: tuple[int, ...] | None = None) -> tuple[Media, Prompts]:
    pixels = torch.arange(count)[:, None, None, None].expand(count, 3, 4, 6) / 255 * 7
    return Media(pixels), Prompts(tuple(f"prompt {i}" for i in range(count)), ({},) * count, groups)


def slow(handler: BaseHTTPRequestHandler, body: dict) -> None:
    time.sleep(2)


def drip(handler: BaseHTTPRequestHandler, body: dict) -> None:
    handler.send_response(200)
    handler.end_headers()
    for _ in range(40):  # a byte comes before any socket's timeout
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.05)


def broken_off(handler: BaseHTTPRequestHandler, body: dict) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"rewards": [0.1')


def huge(handler: BaseHTTPRequestHandler, body: dict) -> None:
    handler.send_response(200)
    handler.end_headers()
    for _ in range(20):
        handler.wfile.write(b"[" * 2**20)


def says_huge(handler: BaseHTTPRequestHandler, body: dict) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", str(10**11))
    handler.end_headers()


def garbage(handler: BaseHTTPRequestHandler, body: dict) -> None:
    handler.wfile.write(b"SSH-2.0-OpenSSH_9.6\r\n")


def answers(status: int, body: bytes | dict, **headers: str) -> Handle:
    return lambda handler, _: reply(handler, status, body, **headers)


# what goes wrong; the line that ends it; whether it is asked again
FAULTS: list[tuple[str, Handle, type[Exception], str, bool]] = [
    ("slow", slow, OSError, "no complete answer in time: is the budget enough?; gave up after", False),
    ("a byte at a time", drip, OSError, "no complete answer in time", False),
    ("500", answers(500, b"oops"), OSError, "answers 500: see its log; gave up after", True),
    ("503", answers(503, b"oops"), OSError, "answers 503: see its log; gave up after", True),
    ("429", answers(429, b"", Retry_After="0"), OSError, "answers 429", True),
    ("broken off", broken_off, OSError, "broken off", True),
    ("no http", garbage, OSError, "broken off", True),
    ("wrong length", answers(200, {"rewards": [1.0]}), ValueError, "1 rewards for 2 prompts", False),
    ("nan", answers(200, b'{"rewards": [NaN, 1]}'), ValueError, "is no JSON (NaN is not JSON)", False),
    ("infinite", answers(200, b'{"rewards": [1e999, 1]}'), ValueError, "is inf, which is no finite number", False),
    ("strings", answers(200, {"rewards": ["0.5", "1"]}), ValueError, "'0.5', which is no finite number", False),
    ("true", answers(200, {"rewards": [True, 1]}), ValueError, "True, which is no finite number", False),
    ("html", answers(200, b"<html>hi</html>"), ValueError, "is no JSON", False),
    ("another json", answers(200, {"scores": [1, 2]}), ValueError, 'no list "rewards"', False),
    ("huge", huge, ValueError, "has more than 16 MB", False),
    ("says it is huge", says_huge, ValueError, "has more than 16 MB", False),
    ("nested", answers(200, b"[" * 100_000), ValueError, "nested too deep", False),
    ("redirect", answers(302, b"", Location="http://169.254.169.254/"), ValueError, "a redirect (302)", False),
    ("401", answers(401, b""), ValueError, "refuses the token (401); check the token", False),
    ("413", answers(413, b""), ValueError, "larger than it takes (413); make the batch", False),
    ("404", answers(404, SECRET.encode()), ValueError, "refuses the request (404): '***'", False),
    ("another's", answers(200, {"rewards": [1, 2], "id": "x"}), ValueError, "to another request", False),
    ("parts", answers(200, {"rewards": [1, 2], "parts": {"a": [1]}}), ValueError, "1 values of the part 'a'", False),
    ("token, part", answers(200, {"rewards": [1, 2], "parts": {SECRET: [1]}}), ValueError, "part '***' for", False),
    ("token, score", answers(200, {"rewards": ["a" * 30 + SECRET, 1]}), ValueError, "aaa***', which", False),
    ("token, list", answers(200, {"rewards": [[SECRET], 1]}), ValueError, "is ['***'], which", False),
]


@pytest.mark.parametrize(("fault", "handle", "kind", "line", "again"), FAULTS, ids=[one[0] for one in FAULTS])
def test_faults(fault: str, handle: Handle, kind: type[Exception], line: str, again: bool, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(SECRET + "\n")
    with served(handle) as (url, seen):
        reward = RemoteReward(url, str(tmp_path / "token"), budget=0.7, retries=1)
        start = time.monotonic()
        with pytest.raises(kind) as caught:
            reward(*batch(2))
        spent = time.monotonic() - start
    assert line in str(caught.value)
    assert str(caught.value).startswith(f"reward server {url}: ")
    assert "\n" not in str(caught.value)
    assert SECRET not in str(caught.value) + repr(reward.servers)
    assert spent < 0.7 + 0.6
    assert len(seen) > 1 if again else len(seen) == 1
    assert seen[0]["headers"]["Authorization"] == f"Bearer {SECRET}"


def test_a_server_that_is_down() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    start = time.monotonic()
    with pytest.raises(OSError, match=r"no connection \(Connection refused\): is it running\?; gave up after 0\.\d s"):
        RemoteReward(url, budget=5.0, retries=1)(*batch(2))
    assert time.monotonic() - start < 1


def test_a_redirect_is_not_followed() -> None:
    with served(honest) as (goal, reached), served(answers(307, b"", Location=goal)) as (url, seen):
        with pytest.raises(ValueError, match="redirect"):
            RemoteReward(url)(*batch(1))
        assert (len(reached), len(seen)) == (0, 1)


def test_what_passes_is_mended_by_another_try() -> None:
    left = [500, 503, 503]

    def flaky(handler: BaseHTTPRequestHandler, body: dict) -> None:
        if left:
            reply(handler, left.pop(), b"")
        else:
            honest(handler, body)

    with served(flaky) as (url, seen):
        scores = RemoteReward(url, budget=10.0, retries=1)(*batch(3))
    assert len(seen) == 4, "a busy server is asked again beyond the retries"
    torch.testing.assert_close(scores.total, torch.arange(3) * 7 / 255, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_order_and_chunks_change_nothing(size: int) -> None:
    """Early batches answer last."""

    def late(handler: BaseHTTPRequestHandler, body: dict) -> None:
        time.sleep(0.002 * (10 - int(body["prompt"][0].split()[1])))
        honest(handler, body)

    with served(late) as (url, seen):
        scores = RemoteReward(url, batch_size=size, in_flight=4)(*batch(7))
    torch.testing.assert_close(scores.total, torch.arange(7) * 7 / 255, rtol=0, atol=1e-6)
    assert scores.valid.all()
    assert [*scores.parts] == ["remote"]
    assert len(seen) == -(-7 // size)


def test_several_are_in_flight_but_no_more_than_asked() -> None:
    lock, now, most = threading.Lock(), [0], [0]

    def counting(handler: BaseHTTPRequestHandler, body: dict) -> None:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.05)
        with lock:
            now[0] -= 1
        honest(handler, body)

    with served(counting) as (url, _):
        RemoteReward(url, batch_size=1, in_flight=3)(*batch(9))
    assert most[0] == 3


def test_groups_stay_whole_and_come_back_in_order() -> None:
    groups = (5, 9, 5, 9, 2, 5)
    with served(honest) as (url, seen):
        reward = RemoteReward(url, batch_size=3, in_flight=1, scope="group")
        scores = reward(*batch(6, groups))
        whole = RemoteReward(url, batch_size=1, scope="set")(*batch(6))
    assert [one["body"]["groups"] for one in seen[:-1]] == [[5, 5, 5], [9, 9, 2]]
    torch.testing.assert_close(scores.total, torch.arange(6) * 7 / 255, rtol=0, atol=1e-6)
    assert torch.equal(scores.total, whole.total)
    assert len(seen) == 3
    with pytest.raises(ValueError, match="needs their group numbers"):
        reward(*batch(6))


def test_what_the_server_could_not_score_is_invalid() -> None:
    body = {
        "rewards": [0.5, None, 7.0],
        "valid": [True, True, False],
        "parts": {"a": [1, None, 3], "remote": [9, 9, 9]},
    }
    with served(answers(200, body)) as (url, _):
        scores = RemoteReward(url)(*batch(3))
    assert scores.valid.tolist() == [True, False, False]
    assert scores.total[0] == 0.5
    assert scores.total[1].isnan()
    assert scores.parts["a"][0] == 1
    assert scores.parts["a"][1].isnan()
    assert torch.equal(scores.parts["remote"].nan_to_num(), scores.total.nan_to_num())


def test_parts_that_differ_between_batches(tmp_path: Path) -> None:
    """Named as the server names them, but for the token."""
    (tmp_path / "token").write_text(SECRET)

    def handle(handler: BaseHTTPRequestHandler, body: dict) -> None:
        reply(handler, 200, {"rewards": [1.0], "parts": {body["prompt"][0][-1] + SECRET: [1.0]}})

    with served(handle) as (url, _), pytest.raises(ValueError, match="parts differ from batch to batch") as caught:
        RemoteReward(url, str(tmp_path / "token"), batch_size=1)(*batch(2))
    assert str(caught.value).endswith("('0***', 'remote'), ('1***', 'remote')")


def test_the_first_failure_ends_all() -> None:
    def handle(handler: BaseHTTPRequestHandler, body: dict) -> None:
        reply(handler, 400 if body["prompt"] == ["prompt 1"] else 500, b"")

    with served(handle) as (url, seen):
        start = time.monotonic()
        with pytest.raises(ValueError, match="400"):
            RemoteReward(url, batch_size=1, in_flight=2, budget=30.0, retries=50)(*batch(20))
    assert time.monotonic() - start < 2
    assert len(seen) < 8


def test_weights_are_checked_once() -> None:
    def handle(handler: BaseHTTPRequestHandler, body: dict) -> None:
        reply(handler, 200, {"status": "ok", "weights": "abcdef"}) if not body else honest(handler, body)

    with served(handle) as (url, seen):
        reward = RemoteReward(url, weights="abc")
        reward(*batch(1))
        reward(*batch(1))
        assert [one["path"] for one in seen] == ["/health", "/compute", "/compute"]
        with pytest.raises(ValueError, match="serves weights 'abcdef', asked for 'abd'"):
            RemoteReward(url, weights="abd")(*batch(1))


def serving(name: str, weights: str) -> Handle:
    """What `flowalign serve` answers, for pictures' brightness."""

    def handle(handler: BaseHTTPRequestHandler, body: dict) -> None:
        reply(handler, 200, {"name": name, "weights": weights}) if not body else honest(handler, body)

    return handle


def test_several_servers_share_the_batches() -> None:
    media, prompts = batch(12)
    with served(serving("glow", "ab")) as (one, seen), served(serving("glow", "ab")) as (two, also):
        reward = RemoteReward([one, two], batch_size=1, in_flight=2, weights="a")
        scores = reward(media, prompts)
        again = reward(media, prompts)
    assert torch.equal(scores.total, by_one(media, prompts))
    assert torch.equal(again.total, scores.total)
    asked = [[call["path"] for call in calls] for calls in (seen, also)]
    assert [paths.count("/health") for paths in asked] == [1, 1]
    assert sum(paths.count("/compute") for paths in asked) == 24
    assert min(paths.count("/compute") for paths in asked) >= 2
    assert reward.ahead == 4


def by_one(media: Media, prompts: Prompts) -> torch.Tensor:
    with served(honest) as (url, _):
        return RemoteReward(url)(media, prompts).total


def test_a_busy_server_gets_less_than_a_free_one() -> None:
    def late(handler: BaseHTTPRequestHandler, body: dict) -> None:
        time.sleep(0.3 if body else 0)
        serving("glow", "ab")(handler, body)

    with served(late) as (one, seen), served(serving("glow", "ab")) as (two, also):
        RemoteReward([one, two], batch_size=1, in_flight=1)(*batch(8))
    assert len(seen) < len(also)


def test_each_process_begins_with_another_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rewards.remote.rank", lambda: 1)
    with served(serving("glow", "ab")) as (one, seen), served(serving("glow", "ab")) as (two, also):
        RemoteReward([one, two])(*batch(2))
    assert [call["path"] for call in seen] == ["/health"]
    assert [call["path"] for call in also] == ["/health", "/compute"]


@pytest.mark.parametrize(("name", "weights"), [("glow", "ba"), ("shine", "ab")])
def test_servers_of_different_rewards_are_refused(name: str, weights: str) -> None:
    servers = served(serving("glow", "ab")), served(serving(name, weights))
    with servers[0] as (one, seen), servers[1] as (two, _), pytest.raises(ValueError, match="serve the same") as caught:
        RemoteReward([one, two])(*batch(2))
    assert f"{two}: serves {name!r} with weights {weights!r}, and reward server {one} 'glow'" in str(caught.value)
    assert [call["path"] for call in seen] == ["/health"]


def test_one_of_several_servers_that_is_down() -> None:
    """The others do not take its place: which is there is the user's to know."""
    with served(serving("glow", "ab")) as (one, seen), pytest.raises(OSError, match=r"127\.0\.0\.1:1: .*refused"):
        RemoteReward([one, "http://127.0.0.1:1"], budget=1.0, retries=0)(*batch(2))
    assert [call["path"] for call in seen] == ["/health"]


@pytest.mark.parametrize("urls", [[], ["http://a:1", "http://a:1/compute"]])
def test_lists_of_urls_that_are_refused(urls: list[str]) -> None:
    with pytest.raises(ValueError, match="url: expected one or several servers, each once"):
        RemoteReward(urls)


@pytest.mark.parametrize(
    ("url", "line"),
    [
        ("file:///etc/passwd", "expected a url"),
        ("ftp://localhost/", "expected a url"),
        ("localhost:8700", "expected a url"),
        ("http://", "expected a url"),
        ("http://localhost:99999", "is no url"),
        ("http://user:pw@localhost", "no user, password"),
        ("http://localhost/?a=1", "no user, password, query"),
        ("http://local host/", "or blank"),
        ("http://localhost/\n", "expected a url"),
        ("http://169.254.169.254", "never asked"),
        ("http://[fe80::1]", "never asked"),
        ("http://[::ffff:169.254.169.254]", "never asked"),
        ("http://100.100.100.200", "never asked"),
        ("http://[fd00:ec2::254]", "never asked"),
    ],
)
def test_urls_that_are_refused(url: str, line: str) -> None:
    with pytest.raises(ValueError, match=line) as caught:
        RemoteReward(url)
    assert "\n" not in str(caught.value)
    assert "pw" not in str(caught.value)


def test_a_name_that_leads_to_a_metadata_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the address that the connection has, whatever it was called: nothing is sent."""
    with served(honest) as (url, seen):
        monkeypatch.setattr("rewards.wire.METADATA", ("127.0.0.1",))
        with pytest.raises(ValueError, match=r"127\.0\.0\.1 is a link-local or metadata address"):
            RemoteReward(url.replace("127.0.0.1", "localhost"))(*batch(1))
    assert seen == []


def test_addresses() -> None:
    check_ip("10.0.0.3", "x")
    check_ip("localhost", "x")
    assert str(address("x", "http://[::1]:80/a/")) == "x http://[::1]:80/a"
    assert str(address("x", "https://h")) == "x https://h:443"
    with pytest.raises(ValueError, match="budget must be positive"):
        address("x", "http://h", budget=0.0)
    with pytest.raises(ValueError, match="batch_size and in_flight must be at least 1, got 0"):
        RemoteReward("http://h", batch_size=0)


def test_secrets(tmp_path: Path) -> None:
    file = tmp_path / "token"
    for text in ("", "two words", "line\nline", "\u00e9"):
        file.write_text(text)
        with pytest.raises(ValueError, match="one line of printable ASCII"):
            read_secret(str(file), "token_file")
    with pytest.raises(FileNotFoundError):
        RemoteReward("http://h", str(tmp_path / "none"))


def test_a_broken_picture_is_not_sent() -> None:
    """A PNG has no nan: the server would see black."""
    media, prompts = batch(3)
    pixels = media.pixels.clone()
    pixels[0, 0, 0, 0] = torch.nan
    with served(honest) as (url, seen):
        scores = RemoteReward(url)(Media(pixels), prompts)
        whole = RemoteReward(url)(media, prompts)
    assert scores.valid.tolist() == [False, True, True]
    assert torch.equal(scores.total[1:], whole.total[1:])
    assert len(seen[0]["body"]["image"]) == 2


def test_a_served_reward_of_groups_is_not_asked_by_samples() -> None:
    body = {"rewards": [1.0, 2.0], "scope": "group"}
    with served(answers(200, body)) as (url, _):
        assert RemoteReward(url, scope="set")(*batch(2)).total.tolist() == [1.0, 2.0]
        with pytest.raises(ValueError, match="its reward scores a whole group: give scope: group"):
            RemoteReward(url)(*batch(2))


def test_requests_come_through_whole() -> None:
    """Everything that media and prompts carry; PNGs to half a level, raw tensors to the bit."""
    videos = torch.rand(2, 3, 3, 5, 7)
    references = (torch.rand(2, 3, 4, 4), torch.rand(1, 3, 6, 5))
    data = ({"spec": [1, "\u00fc"]}, {})
    prompts = Prompts(("a \u2028 b", ""), data, (4, -1))
    asked = Request(Media(videos, 16.0, references), prompts, "number")
    for exact in (False, True):
        read = decode_request(encode_request(asked, exact))
        assert (read.prompts, read.id, read.media.fps) == (prompts, "number", 16.0)
        assert torch.equal(read.media.pixels, videos) == exact
        torch.testing.assert_close(read.media.pixels, videos, rtol=0, atol=0.501 / 255)
        assert read.media.references is not None
        torch.testing.assert_close(read.media.references[1], references[1], rtol=0, atol=0.501 / 255)
    pictures = decode_request(encode_request(Request(Media(videos[:, 0]), prompts)))
    torch.testing.assert_close(pictures.media.pixels, videos[:, 0], rtol=0, atol=0.501 / 255)


def test_names_of_files_stay_here() -> None:
    """They are this machine's, and a server opens none; references go as pictures."""
    named = {"image": "/data/a.png", "media": "/data/b.png", "references": ["/data/c.png"], "include": ["clock"]}
    media = Media(torch.rand(2, 3, 4, 4), references=(torch.rand(1, 3, 4, 4),) * 2)
    prompts = Prompts(("a", "b"), (named, {"include": []}), (0, 0))
    with served(honest) as (url, seen):
        RemoteReward(url)(media, prompts)
    asked = decode_request(json.dumps(seen[0]["body"]).encode())
    assert asked.prompts == replace(prompts, metadata=({"include": ["clock"]}, {"include": []}))
    assert asked.media.references is not None
    assert prompts.metadata[0] is named
    assert "image" in named, "the run's own prompts are as they were"


def test_metadata_that_is_no_json() -> None:
    asked = Prompts(("a",), ({"tensor": torch.rand(1)},))
    with served(honest) as (url, seen), pytest.raises(ValueError, match="metadata cannot be sent as JSON"):
        RemoteReward(url)(Media(torch.rand(1, 3, 4, 4)), asked)
    assert seen == []


def test_no_gradient() -> None:
    with pytest.raises(ValueError, match="has no gradient"):
        RemoteReward("http://localhost:1")(*batch(1), grad=True)
