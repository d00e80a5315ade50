"""The dashboard: a web page that a node serves itself, live by server-sent events, and its metrics for Prometheus."""

import asyncio
import contextlib
import errno
import hmac
import json
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from aiohttp import web

from tesseract_async.identity import PeerID
from tesseract_async.metrics import Metrics
from tesseract_async.monitoring import prometheus
from tesseract_async.monitoring.observer import SwarmObserver
from tesseract_async.transport.base import is_loopback

PAGE = Path(__file__).parent / "page"
FILES = {"": "index.html", "style.css": "style.css", "page.js": "page.js", "icon.svg": "icon.svg"}
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
COOKIE = "tesseract_token"

# nothing from elsewhere, nothing inline: text that strangers write into the swarm is shown as text
SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Dashboard:
    """Serves the page, ``/api/state`` (JSON), ``/api/events`` (the same, live) and ``/metrics`` over HTTP.

    Use it as an async context manager. On any address but loopback it asks for a token: `url` holds it.
    """

    def __init__(
        self, observer: SwarmObserver, *, host: str = "127.0.0.1", port: int = 0, token: str | None = None
    ) -> None:
        """`token`: the visitors' password; made up if none is given and `host` is not loopback."""
        if token is None and not is_loopback(host):
            token = secrets.token_urlsafe(16)
        self.token = token
        self._observer = observer
        self._host = host
        self._port = port
        self._runner: web.AppRunner | None = None
        self._streams: set[asyncio.Task[object]] = set()

    async def __aenter__(self) -> Self:
        """Raises: OSError with a sentence if the port is in use."""
        app = web.Application(middlewares=[self._guard])
        for path in FILES:
            app.router.add_get(f"/{path}", self._file)
        app.router.add_get("/api/state", self._state)
        app.router.add_get("/api/events", self._events)
        app.router.add_get("/api/expert", self._expert)
        app.router.add_get("/api/server", self._server)
        app.router.add_get("/metrics", self._metrics)
        self._runner = await _listen(app, self._host, self._port, "the dashboard")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for stream in self._streams:
            stream.cancel()
        if self._runner is not None:
            await self._runner.cleanup()

    @property
    def url(self) -> str:
        assert self._runner is not None, "entered"
        host, port = self._runner.addresses[0][:2]
        host = f"[{host}]" if ":" in host else host
        return f"http://{host}:{port}/" + (f"?token={self.token}" if self.token else "")

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if self.token is None:
            # a foreign page could point its own name at this address; without a token the name must be a loopback one
            if not is_loopback(_host_of(request)):
                raise web.HTTPForbidden(text="ask for this page by its own address\n")
        else:
            bearer = request.headers.get("Authorization", "").removeprefix("Bearer ")
            given = request.query.get("token") or request.cookies.get(COOKIE) or bearer
            if not hmac.compare_digest(given.encode(errors="replace"), self.token.encode()):
                raise web.HTTPForbidden(text="a token is needed: open the address that the command printed\n")
        if self.token is not None and request.path == "/" and "token" in request.query:
            # from here on by cookie: the token stays out of the address bar, the history and bookmarks
            seen = web.Response(status=303, headers={"Location": "./", **SECURITY_HEADERS})
            seen.set_cookie(COOKIE, self.token, httponly=True, samesite="Strict")
            return seen
        response = await handler(request)
        if not response.prepared:
            response.headers.update(SECURITY_HEADERS)
        return response

    async def _file(self, request: web.Request) -> web.StreamResponse:
        path = PAGE / FILES[request.path.lstrip("/")]
        return web.Response(text=path.read_text(), content_type=TYPES[path.suffix])

    async def _state(self, request: web.Request) -> web.StreamResponse:
        return web.json_response(self._observer.state())

    async def _expert(self, request: web.Request) -> web.StreamResponse:
        try:
            return web.json_response(self._observer.expert(request.query.get("uid", "")))
        except ValueError as error:
            raise web.HTTPNotFound(text=f"{error}\n") from None

    async def _server(self, request: web.Request) -> web.StreamResponse:
        try:
            return web.json_response(self._observer.server(PeerID.parse(request.query.get("peer", ""))))
        except (ValueError, KeyError):
            raise web.HTTPNotFound(text="this server is not known\n") from None

    async def _metrics(self, request: web.Request) -> web.StreamResponse:
        return _exposed(self._observer.node.metrics, self._observer)

    async def _events(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store"})
        response.headers.update(SECURITY_HEADERS)
        await response.prepare(request)
        task = asyncio.current_task()
        assert task is not None
        self._streams.add(task)
        observer, told = self._observer, _Told()
        try:
            while True:
                await response.write(f"data: {told.news(observer)}\n\n".encode())
                if observer.num_looks == told.num_looks:  # a slow visitor may have missed one meanwhile
                    await observer.wait_changed()
        except (ConnectionError, asyncio.CancelledError):
            return response
        finally:
            self._streams.discard(task)


@contextlib.asynccontextmanager
async def serving_metrics(metrics: Metrics, host: str, port: int) -> AsyncIterator[str]:
    """Serve a node's figures under ``/metrics`` meanwhile; gives the address. Raises: OSError with a sentence."""

    async def answer(request: web.Request) -> web.StreamResponse:
        return _exposed(metrics)

    app = web.Application()
    app.router.add_get("/metrics", answer)
    runner = await _listen(app, host, port, "the page of metrics")
    try:
        yield f"http://{host}:{runner.addresses[0][1]}/metrics"
    finally:
        await runner.cleanup()


def _exposed(metrics: Metrics, observer: SwarmObserver | None = None) -> web.Response:
    body = prometheus.render(metrics, observer)
    return web.Response(body=body, headers={"Content-Type": prometheus.CONTENT_TYPE})


async def _listen(app: web.Application, host: str, port: int, what: str) -> web.AppRunner:
    runner = web.AppRunner(app, access_log=None, handle_signals=False)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
    except OSError as error:
        await runner.cleanup()
        advice = "choose another port" if error.errno == errno.EADDRINUSE else "is it an address of this machine?"
        raise OSError(error.errno, f"{what} cannot listen on {host} port {port}: {advice}") from None
    return runner


class _Told:
    """The messages for one visitor: the whole state first, then changes only."""

    def __init__(self) -> None:
        self.num_looks: int | None = None
        """The observer's count when this visitor was told last."""
        self._num_lines = 0
        self._num_points: dict[str, int] = {}
        self._grids: dict[str, str] = {}

    def news(self, observer: SwarmObserver) -> str:
        """Return the next message: JSON in one line. Its ``history`` and ``log`` continue those sent before, and grids
        that did not change are left out; ``whole`` is true in the first message."""
        state, before = observer.state(), self.num_looks
        lines = observer.num_log_lines - self._num_lines
        self.num_looks, self._num_lines = observer.num_looks, observer.num_log_lines
        if before is not None:
            state["history"] = observer.history.since(self._num_points)
            state["log"] = state["log"][-lines:] if lines else []
            state["grids"] = [grid for grid in state["grids"] if self._grids.get(grid["prefix"]) != json.dumps(grid)]
        self._num_points = dict(observer.history.num_points)
        self._grids |= {grid["prefix"]: json.dumps(grid) for grid in state["grids"]}
        return json.dumps({"whole": before is None, **state}, separators=(",", ":"))


def _host_of(request: web.Request) -> str:
    host = request.host
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]
