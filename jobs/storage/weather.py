"""A proxy in front of an S3 server that makes it slow and lets it fail, as a store far away does."""

from __future__ import annotations

import asyncio
import logging
import random
import threading
from collections import Counter
from collections.abc import Callable
from types import TracebackType

import aiohttp
from aiohttp import web
from multidict import CIMultiDict
from yarl import URL

# Of one connection, not of the request: they end here.
_OWN = {"connection", "keep-alive", "transfer-encoding", "te", "upgrade", "expect"}
FAILURES = ("503", "500", "reset", "lost", "cut")
_SLOW_DOWN = "<?xml version='1.0'?><Error><Code>{code}</Code><Message>as planned</Message></Error>"


class Weather:
    """The proxy, on loopback, running inside a ``with`` block.

    Args:
        target: URL of the server.
        latency: seconds that each request takes more.
        rate: share of requests that fail: refused with 503 or 500, connection reset before the server sees the
            request, answer lost after the server did what was asked, answer cut in the middle.
        seed: of which ones and how.
        host: the address that it answers at.

    Attributes:
        url: of the proxy.
        requests: method -> how many came.
        failed: kind of ``FAILURES`` -> how many.
        watch: called with each request's method and path, before it is passed on.
    """

    def __init__(
        self, target: str, latency: float = 0.0, rate: float = 0.0, seed: int = 0, host: str = "127.0.0.1"
    ) -> None:
        self._target, self._host = target, host
        self.latency, self.rate = latency, rate
        self._draw = random.Random(seed)
        self.url = ""
        self.requests: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self.watch: Callable[[str, str], object] = lambda method, path: None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="weather", daemon=True)

    def __enter__(self) -> Weather:
        self._thread.start()
        self._ask(self._open())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ask(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _ask(self, work: object) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(30)  # type: ignore[arg-type]

    async def _open(self) -> None:
        self._client = aiohttp.ClientSession(auto_decompress=False, connector=aiohttp.TCPConnector(limit=0))
        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{path:.*}", self._answer)
        silent = logging.Logger("weather", logging.CRITICAL + 1)  # what breaks here is meant to
        self._runner = web.AppRunner(app, auto_decompress=False, shutdown_timeout=1, logger=silent, access_log=None)
        await self._runner.setup()
        site = web.TCPSite(self._runner, self._host, 0)
        await site.start()
        self.url = f"http://{self._host}:{self._runner.addresses[0][1]}"

    async def _close(self) -> None:
        await self._runner.cleanup()
        await self._client.close()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.requests[request.method] += 1
        self.watch(request.method, request.path)
        fails = self._draw.choice(FAILURES) if self._draw.random() < self.rate else ""
        if fails:
            self.failed[fails] += 1
        await asyncio.sleep(self.latency)
        body = await request.read()
        if fails in ("503", "500"):
            code = "SlowDown" if fails == "503" else "InternalError"
            return web.Response(status=int(fails), text=_SLOW_DOWN.format(code=code), content_type="application/xml")
        if fails == "reset":
            return _reset(request)
        status, headers, data = await self._passed_on(request, body)
        if fails == "lost":
            return _reset(request)
        if fails == "cut":
            return await _cut(request, status, headers, data)
        return web.Response(status=status, headers=headers, body=None if request.method == "HEAD" else data)

    async def _passed_on(self, request: web.Request, body: bytes) -> tuple[int, CIMultiDict[str], bytes]:
        # With the Host that the client signed.
        headers = CIMultiDict((name, value) for name, value in request.headers.items() if name.lower() not in _OWN)
        url = URL(self._target + request.raw_path, encoded=True)
        skipped = ("User-Agent", "Accept", "Accept-Encoding", "Content-Type")
        async with self._client.request(
            request.method, url, headers=headers, data=body or None, skip_auto_headers=skipped, allow_redirects=False
        ) as answer:
            data = await answer.read()
            kept = CIMultiDict((name, value) for name, value in answer.headers.items() if name.lower() not in _OWN)
            return answer.status, kept, data


def _reset(request: web.Request) -> web.Response:
    if request.transport is not None:
        request.transport.abort()
    return web.Response()


async def _cut(request: web.Request, status: int, headers: CIMultiDict[str], data: bytes) -> web.StreamResponse:
    response = web.StreamResponse(status=status, headers=headers)
    await response.prepare(request)
    if data and request.method != "HEAD":
        await response.write(data[: len(data) // 2])
    if request.transport is not None:
        request.transport.abort()
    return response
