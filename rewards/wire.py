"""Careful JSON over HTTP, on the standard library: how remote rewards and judges are asked."""

from __future__ import annotations

import http.client
import ipaddress
import json
import math
import random
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeVar
from urllib.parse import urlsplit

T = TypeVar("T")

MAX_ANSWER = 16 * 2**20  # bytes; scores of a batch are a few kilobytes, a judge's reasoning some tens
FIRST_DELAY, LONGEST_DELAY = 0.25, 8.0  # seconds between tries, doubled after each
BUSY = (429, 503)
# of clouds that hand out credentials elsewhere than at a link-local address: Alibaba, Oracle, AWS over IPv6
METADATA = ("100.100.100.200", "192.0.0.192", "fd00:ec2::254")
_jitter = random.Random()  # of its own: python's global generator may be a run's


@dataclass(frozen=True)
class Address:
    """Where requests go and how they are sent again.

    what: how errors call it, as in "reward server". key: sent as a bearer token, and shown nowhere. budget: seconds for
    one request with all its tries. retries: after connection errors and 5xx; of "busy" (429, 503) only the budget.
    """

    what: str
    scheme: str
    host: str
    port: int
    path: str
    key: str = field(default="", repr=False)
    budget: float = 60.0
    retries: int = 5

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.what} {self.scheme}://{host}:{self.port}{self.path}"


class _Again(Exception):
    """A failure that may pass: worth another try, after at least `delay` seconds."""

    def __init__(self, reason: str, busy: bool = False, delay: float = 0.0) -> None:
        super().__init__(reason)
        self.busy, self.delay = busy, delay


def address(what: str, url: str, key: str = "", budget: float = 60.0, retries: int = 5) -> Address:
    """The address of a url out of a config.

    Raises: ValueError for what is no plain http(s) url, for link-local and cloud metadata addresses, and for settings
    out of range.
    """
    try:
        parts = urlsplit(url)
        port = parts.port or {"http": 80, "https": 443}.get(parts.scheme, 0)
    except ValueError as error:
        raise ValueError(f"{what}: {url!r:.200} is no url ({error})") from error
    if parts.scheme not in ("http", "https") or not parts.hostname or not url.isascii() or not url.isprintable():
        raise ValueError(f"{what}: expected a url such as http://localhost:8700, got {url!r:.200}")
    if parts.username is not None or parts.query or parts.fragment or " " in url:
        raise ValueError(f"{what}: the url may have no user, password, query or blank; secrets go into a file")
    if not 0 < budget < math.inf or retries < 0:
        raise ValueError(f"{what}: budget must be positive and retries at least 0, got {budget} and {retries}")
    check_ip(parts.hostname, what)
    return Address(what, parts.scheme, parts.hostname, port, parts.path.rstrip("/"), key, budget, retries)


def check_ip(host: str, what: str) -> None:
    """Raises: ValueError for the addresses at which clouds hand out credentials, and all link-local ones."""
    try:
        ip = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return  # a name; it is checked when it has led somewhere
    ip = getattr(ip, "ipv4_mapped", None) or ip
    if ip.is_link_local or str(ip) in METADATA:
        raise ValueError(f"{what}: {host} is a link-local or metadata address, which is never asked")


def read_secret(path: str, what: str) -> str:
    """The token in a file: one line of printable ASCII. Raises: ValueError or OSError, without the token."""
    text = Path(path).expanduser().read_bytes().strip()
    if not text or any(not 33 <= byte <= 126 for byte in text):
        raise ValueError(f"{what}: {path} must hold one line of printable ASCII, the token")
    return text.decode()


def ask(to: Address, path: str, body: bytes | None, stop: threading.Event | None = None) -> Any:
    """The JSON that a POST of `body`, or a GET where there is none, brings, within the budget.

    Tried again with a random delay after connection errors, 408, 429 and 5xx, and after nothing else. Redirects are
    not followed, proxies not used. `stop` ends it between two tries.

    Raises: OSError where the server could not be had in time, ValueError where its answer is one that another try would
    not mend; one line, with the url and what to do.
    """
    deadline, stop, tries = time.monotonic() + to.budget, stop or threading.Event(), 0
    delay = FIRST_DELAY
    while True:
        try:
            return _exchange(to, path, body, deadline)
        except _Again as error:
            tries += not error.busy
            pause = max(error.delay, delay * _jitter.uniform(0.5, 1.0))
            if tries > to.retries or time.monotonic() + pause >= deadline or stop.wait(pause):
                raise OSError(f"{to}: {error}; gave up after {_spent(to, deadline)}") from error
        delay = min(2 * delay, LONGEST_DELAY)


def _spent(to: Address, deadline: float) -> str:
    return f"{min(to.budget, to.budget - deadline + time.monotonic()):.1f} s of a budget of {to.budget:g} s"


def _exchange(to: Address, path: str, body: bytes | None, deadline: float) -> Any:
    """One try. A timer hangs up at the deadline, since a socket's timeout starts anew with every byte."""
    connection = _connected(to, deadline)
    hang_up = threading.Timer(max(deadline - time.monotonic(), 0.0), _shut, [connection.sock])
    hang_up.daemon = True
    hang_up.start()
    try:
        status, headers, raw = _talk(connection, to, path, body)
        if time.monotonic() >= deadline:
            raise TimeoutError  # what has been read may be cut off
    except (OSError, http.client.HTTPException) as error:
        late = time.monotonic() >= deadline - 0.01
        reason = "no complete answer in time: is the budget enough?" if late else f"broken off ({_reason(error)})"
        raise _Again(reason) from error
    finally:
        hang_up.cancel()
        connection.close()
    if status == 200:
        return _parsed(to, raw)
    return _refuse(to, status, headers, raw)


def _connected(to: Address, deadline: float) -> http.client.HTTPConnection:
    left = max(deadline - time.monotonic(), 0.01)
    kind = http.client.HTTPSConnection if to.scheme == "https" else http.client.HTTPConnection
    connection = kind(to.host, to.port, timeout=left)
    try:
        connection.connect()
        check_ip(connection.sock.getpeername()[0], str(to))  # where the name has led, before anything is sent
    except ssl.SSLCertVerificationError as error:
        raise ValueError(f"{to}: its certificate is not valid: {error.verify_message}") from error
    except OSError as error:
        raise _Again(f"no connection ({_reason(error)}): is it running?") from error
    except ValueError:
        connection.close()
        raise
    return connection


def _shut(sock: socket.socket) -> None:
    with suppress(OSError):  # it may have gone
        socket.socket.shutdown(sock, socket.SHUT_RDWR)  # the plain one also under TLS: the reader sees an end


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or type(error).__name__


def _talk(
    connection: http.client.HTTPConnection, to: Address, path: str, body: bytes | None
) -> tuple[int, http.client.HTTPMessage, bytes]:
    headers = {"Accept": "application/json", "Connection": "close"}
    if body is not None:
        headers["Content-Type"] = "application/json"
    if to.key:
        headers["Authorization"] = f"Bearer {to.key}"
    with suppress(BrokenPipeError, ConnectionResetError):  # who refuses a body answers before having read all of it
        connection.request("GET" if body is None else "POST", to.path + path, body, headers)
    response = connection.getresponse()
    length = response.headers.get("Content-Length", "")
    declared = int(length) if length.isdigit() and len(length) < 19 else 0
    raw = response.read(MAX_ANSWER + 1) if declared <= MAX_ANSWER else b""
    if max(declared, len(raw)) > MAX_ANSWER:
        raise ValueError(f"{to}: its answer has more than {MAX_ANSWER >> 20} MB; this is no such server")
    if len(raw) < declared:
        raise http.client.IncompleteRead(raw, declared - len(raw))
    return response.status, response.headers, raw


def _parsed(to: Address, raw: bytes) -> Any:
    def constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is not JSON")

    try:
        return json.loads(raw.decode(), parse_constant=constant)
    except RecursionError as error:
        raise ValueError(f"{to}: its answer is nested too deep") from error
    except ValueError as error:
        reason = str(error)[:80]
        raise ValueError(f"{to}: its answer is no JSON ({reason}): {shown(to, raw)}. Is the url right?") from error


def _refuse(to: Address, status: int, headers: http.client.HTTPMessage, raw: bytes) -> NoReturn:
    """What another status than 200 means."""
    if status in BUSY or status == 408 or 500 <= status < 600:
        after = headers.get("Retry-After", "")
        delay = float(after) if after.isdigit() and len(after) < 9 else 0.0
        raise _Again(f"answers {status}: see its log", status in BUSY, delay)
    if 300 <= status < 400:
        raise ValueError(f"{to}: answers with a redirect ({status}), which is not followed; give the url it leads to")
    if status in (401, 403):
        raise ValueError(f"{to}: refuses the token ({status}); {'check' if to.key else 'give'} the token or key")
    if status == 413:
        raise ValueError(f"{to}: the request is larger than it takes (413); make the batch or the pictures smaller")
    raise ValueError(f"{to}: refuses the request ({status}): {shown(to, raw)}")


def shown(to: Address, raw: bytes | str, longest: int = 120) -> str:
    """A server's text for one line of ours, without the key."""
    text = raw.decode("ascii", "replace") if isinstance(raw, bytes) else raw
    return ascii(hidden(to, text)[:longest])


def hidden(to: Address, text: str) -> str:
    """A text without the key."""
    return text.replace(to.key, "***") if to.key else text


def gather(asks: Sequence[Callable[[threading.Event], T]], in_flight: int) -> list[T]:
    """What the callables return, in order, with `in_flight` running at once; the first failure ends all.

    Each is given an event that is set where it should not be tried again.
    """
    stop = threading.Event()
    pool = ThreadPoolExecutor(in_flight, thread_name_prefix="flowalign-ask")
    try:
        futures = [pool.submit(one, stop) for one in asks]
        done = wait(futures, return_when=FIRST_EXCEPTION).done
        failed = [error for future in futures if future in done and (error := future.exception())]
        if failed:
            raise failed[0]
        return [future.result() for future in futures]
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
