"""How a reward server keeps its connections: not too many, and none for long that asks nothing.

By itself uvicorn waits without limit for a request to come whole: whoever reaches the port could take all connections
that the system lets a process have, without a token.
"""

from __future__ import annotations

from typing import Any

IDLE_SECONDS = 30.0  # for a request's headers to arrive, and for its answer to be fetched
MOST = 256  # open at once: a process may commonly have 1024 files open


def patient() -> Any:
    """uvicorn's protocol, of which a connection ends after `IDLE_SECONDS` in which no request of it is worked at.

    Beyond `MOST` the one that has been idle for longest makes room: who connects and asks at once is always heard.
    """
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Connection(H11Protocol):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.idle_since = self.loop.time()
            self.look = self.loop.call_later(IDLE_SECONDS, self.end_if_idle)
            if len(self.connections) > MOST:
                idle = [one for one in self.connections if isinstance(one, Connection) and not one.at_work]
                oldest = min(idle, key=lambda one: one.idle_since)
                self.connections.discard(oldest)
                oldest.transport.abort()

        @property
        def at_work(self) -> bool:
            """Whether a request has come and is not answered yet; not while the client leaves answers lying."""
            return self.cycle is not None and not self.cycle.response_complete and not self.flow.write_paused

        def on_response_complete(self) -> None:
            self.idle_since = self.loop.time()
            super().on_response_complete()

        def connection_lost(self, exc: Exception | None) -> None:
            self.look.cancel()
            super().connection_lost(exc)

        def end_if_idle(self) -> None:
            left = IDLE_SECONDS if self.at_work else self.idle_since + IDLE_SECONDS - self.loop.time()
            if left <= 0:
                self.transport.abort()
            else:
                self.look = self.loop.call_later(left, self.end_if_idle)

    return Connection


def server(app: Any) -> Any:
    """uvicorn's, of an ASGI application."""
    import uvicorn

    settings = uvicorn.Config(
        app, http=patient(), ws="none", log_level="warning", access_log=False, server_header=False
    )
    return uvicorn.Server(settings)
