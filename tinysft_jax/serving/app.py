"""The web application: endpoints, what is refused before they are reached, and streams. It never touches the device."""

import asyncio
import base64
import contextlib
import hashlib
import json
import re
import secrets
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tinysft_jax.console import UserError
from tinysft_jax.sampling.engine import Closed, Engine, Refused
from tinysft_jax.serving.calls import ApiError, Call, Reader
from tinysft_jax.serving.choices import Choice, Piece
from tinysft_jax.serving.metrics import Metrics
from tinysft_jax.serving.replies import Reply
from tinysft_jax.tokenizer import ChatTokenizer

MAX_BODY_BYTES = 2_000_000
BODY_SECONDS = 30  # within which a body must have come
ANSWER_SECONDS = 600  # within which an answer must have ended, waiting included
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")


class Served(NamedTuple):
    """What is served, and to whom."""

    name: str  # of the model
    engine: Engine
    reader: Reader
    tokenizer: ChatTokenizer
    metrics: Metrics
    api_key: str | None = None  # None: everyone is answered
    loopback_only: bool = True  # whether requests must name this machine as their host


def make_app(served: Served) -> ASGIApp:
    page = _page()

    async def models(_: Request) -> Response:
        of_model = {"id": served.name, "object": "model", "created": started, "owned_by": "tinysft-jax"}
        of_model |= {"context_length": served.reader.length, "chat": served.tokenizer.template is not None}
        return JSONResponse({"object": "list", "data": [of_model]})

    async def health(_: Request) -> Response:
        is_ready = served.engine.is_ready.is_set() and served.engine.failure is None
        return JSONResponse({"status": "ready" if is_ready else "starting"}, 200 if is_ready else 503)

    async def metrics(_: Request) -> Response:
        return Response(served.metrics.text(), media_type="text/plain; version=0.0.4")

    async def on_error(_: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 500
        message = error.detail if isinstance(error, HTTPException) else "the server failed; its log says why"
        return ApiError(status, message, headers=getattr(error, "headers", None)).response()

    started = int(time.time())
    routes = [
        Route("/", lambda _: page),
        Route("/health", health),
        Route("/metrics", metrics),
        Route("/v1/models", models),
        Route("/v1/chat/completions", _Answers(served, is_chat=True), methods=["POST"]),
        Route("/v1/completions", _Answers(served, is_chat=False), methods=["POST"]),
    ]
    return _Guard(Starlette(routes=routes, exception_handlers={HTTPException: on_error, Exception: on_error}), served)


def _page() -> Response:
    """The page, which may load nothing and run no script but its own."""
    text = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:; connect-src 'self'"
    policy = f"default-src 'none'; {policy}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    headers = {"content-security-policy": policy, "x-content-type-options": "nosniff", "referrer-policy": "no-referrer"}
    return HTMLResponse(text, headers=headers)


class _Guard:
    """Refuses requests from other sites' pages and without the key, and counts all responses.

    A page of another site can't read what it gets, but it could make the model work. And a name of its own that it lets
    point here would make it the same site; so where only this machine is served, requests must be for its names.
    """

    def __init__(self, app: ASGIApp, served: Served):
        self._app, self._served = app, served

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # there is no lifespan to speak of, and no web socket
            return await self._app(scope, receive, send)

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                path = scope["path"] if scope.get("route") or scope.get("endpoint") else "other"
                self._served.metrics.responses.labels(path, message["status"]).inc()
            await send(message)

        try:
            self._check(Request(scope))
        except ApiError as error:
            return await error.response()(scope, receive, counted)
        await self._app(scope, receive, counted)

    def _check(self, request: Request) -> None:
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        if self._served.api_key is not None and request.scope["path"] not in ("/", "/health"):
            scheme, _, key = request.headers.get("authorization", "").partition(" ")
            is_right = secrets.compare_digest(key.strip().encode(), self._served.api_key.encode())
            if scheme.lower() != "bearer" or not is_right:
                headers = {"www-authenticate": "Bearer"}
                raise ApiError(401, "a valid API key is needed", code="invalid_api_key", headers=headers)
        if self._served.loopback_only and re.sub(r":\d*$", "", host.lower()) not in LOOPBACK_NAMES:
            raise ApiError(403, "this server answers requests for localhost only")
        if origin is not None and origin.lower().partition("://")[2] != host.lower():
            raise ApiError(403, "requests from pages of other sites are not answered")


class _Answers:
    """The endpoint of chats, or of completions."""

    def __init__(self, served: Served, is_chat: bool):
        self._served, self._is_chat = served, is_chat

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def respond() -> None:
            try:
                response = await answers.response()
            except ApiError as error:
                response = error.response()
            await response(scope, receive, send)

        try:
            body = await _read_body(Request(scope, receive))
            call = await run_in_threadpool(self._served.reader.read, body, self._is_chat)
            answers = _Running(self._served, call)
        except ClientDisconnect:
            return
        except (ApiError, UserError) as error:
            error = error if isinstance(error, ApiError) else ApiError(400, str(error))
            return await error.response()(scope, receive, send)
        work, gone = map(asyncio.ensure_future, (respond(), _disconnected(receive)))
        try:
            seconds = ANSWER_SECONDS + BODY_SECONDS  # after which a client has to go that does not read
            await asyncio.wait((work, gone), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            answers.cancel()
            gone.cancel()
            if not work.done():
                work.cancel()
        if work.done():
            work.result()


async def _read_body(request: Request) -> bytes:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # what pages of other sites can't send without asking first
        raise ApiError(415, "the body must be JSON, with the header Content-Type: application/json")
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > MAX_BODY_BYTES:
                    raise ApiError(413, f"the body has more than {MAX_BODY_BYTES:,} bytes")
    except TimeoutError:
        raise ApiError(408, f"the body did not come within {BODY_SECONDS} s") from None
    return bytes(body)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class _Running:
    """The answers to one request, which are being generated. Raises: ApiError, if there is no room for them."""

    def __init__(self, served: Served, call: Call):
        self._served, self._call, self._start = served, call, time.perf_counter()
        self._pieces: asyncio.Queue[Piece] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def post(piece: Piece) -> None:
            with contextlib.suppress(RuntimeError):  # the server has ended
                loop.call_soon_threadsafe(self._pieces.put_nowait, piece)

        n = call.n * len(call.prompts)
        self._requests = [Choice(call, served.tokenizer, number, post).request for number in range(n)]
        try:
            served.engine.submit(self._requests)
        except (Refused, Closed) as error:
            status = 429 if isinstance(error, Refused) else 503
            raise ApiError(status, str(error), code="overloaded", headers={"retry-after": "1"}) from None
        self._n_unfinished = n
        served.metrics.prompt_tokens.inc(sum(map(len, call.prompts)))

    def cancel(self) -> None:
        """Ends what has not ended."""
        for request in self._requests:
            self._served.engine.cancel(request)

    async def response(self) -> Response:
        """A stream begins with the first piece, so an error before it has a status of its own. Raises: ApiError."""
        reply = Reply(self._call, self._served.name)
        if not self._call.streams:
            return JSONResponse(reply.whole([piece async for piece in self._received()]))
        events = self._events(reply)
        headers = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-store"}
        return StreamingResponse(_in_order(await anext(events), events), headers=headers)

    async def _received(self) -> AsyncIterator[Piece]:
        """The pieces, until all answers have ended. Raises: ApiError, if that takes too long."""
        while self._n_unfinished:
            try:
                async with asyncio.timeout(ANSWER_SECONDS - (time.perf_counter() - self._start)):
                    piece = await self._pieces.get()
            except TimeoutError:
                raise ApiError(408, f"the answer was not complete within {ANSWER_SECONDS} s") from None
            if piece.finish == "cancelled":
                raise ApiError(503, "the server is shutting down")
            if piece.finish:
                self._n_unfinished -= 1
                self._served.metrics.ended(piece, time.perf_counter() - self._start)
            yield piece

    async def _events(self, reply: Reply) -> AsyncIterator[str]:
        n_generated = {}
        async for piece in self._received():
            n_generated[piece.index] = piece.n_generated
            yield _event(reply.chunk(piece))
        if self._call.counts:
            yield _event(reply.last_chunk(n_generated.values()))
        yield "data: [DONE]\n\n"


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


async def _in_order(first: str, rest: AsyncIterator[str]) -> AsyncIterator[str]:
    """The events; an error that comes after the first is an event, too."""
    yield first
    try:
        async for event in rest:
            yield event
    except ApiError as error:
        yield _event(error.body())
