"""Serve a model over HTTP: the OpenAI API, a page to chat in, health and metrics.

| path | what |
|---|---|
| POST /v1/chat/completions, POST /v1/completions | generate, whole or as a stream of server-sent events |
| GET /v1/models, GET /v1/models/NAME | the model's name |
| GET / | a page to chat in |
| GET /health | 200 as soon as the model is loaded |
| GET /metrics | counters for Prometheus |
"""

import asyncio
import hmac
import ipaddress
import json
import logging
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from .generation import ClientLeftError, Generation, Model
from .metrics import Metrics
from .requests import ApiError, parse_request
from .responses import Answer, listed, server_sent

log = logging.getLogger(__name__)

PAGE = Path(__file__).with_name("page.html")
LARGEST_BODY = 4 << 20  # bytes
BODY_S = 30.0  # seconds in which a body must arrive
LEFT = 499  # the status that logs show for a client that left, as nginx writes it
#: The page runs its own script and style, and talks to this server alone.
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class Options(NamedTuple):
    """Settings of the server.

    Attributes
    ----------
    api_key : str, optional
        Required of every request, except for the page and /health.
    timeout : float
        Seconds after which a request is given up.
    log_requests : bool
        Log a line for each request.
    host : str
        Address to listen on.
    """

    api_key: str | None = None
    timeout: float = 600.0
    log_requests: bool = False
    host: str = "127.0.0.1"


class Server:
    """Answer requests with one model.

    Parameters
    ----------
    model : Model
    options : Options
    """

    def __init__(self, model: Model, options: Options):
        self.model, self.options, self.created = model, options, int(time.time())
        self.metrics = Metrics(model.batcher)

    def app(self) -> Starlette:
        """Make the ASGI application."""
        routes = [
            Route("/", self.page),
            Route("/health", self.health),
            Route("/metrics", self.show_metrics),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.one_model),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.completions, methods=["POST"]),
        ]
        middleware = []
        if is_loopback(self.options.host):
            middleware.append(Middleware(KnownHosts, ("localhost", "127.0.0.1", "::1", self.options.host)))
        handlers: Any = {ApiError: api_error, HTTPException: http_error, Exception: unknown_error}
        return Starlette(routes=routes, middleware=middleware, exception_handlers=handlers)

    async def page(self, request: Request) -> Response:
        """Show the page to chat in."""
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers=PAGE_HEADERS)

    async def health(self, request: Request) -> Response:
        """Say whether the thread that generates is alive."""
        alive = self.model.batcher.thread.is_alive()
        return JSONResponse({"status": "ok" if alive else "the decoder has stopped"}, 200 if alive else 503)

    async def show_metrics(self, request: Request) -> Response:
        """Show the counters."""
        self.check_key(request)
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def models(self, request: Request) -> Response:
        """List the model."""
        self.check_key(request)
        data = list(listed(self.model.names, self.created, self.model.batcher.slots.context))
        return JSONResponse({"object": "list", "data": data})

    async def one_model(self, request: Request) -> Response:
        """Describe the model."""
        self.check_key(request)
        name = request.path_params["name"]
        for found in listed(self.model.names, self.created, self.model.batcher.slots.context):
            if found["id"] == name:
                return JSONResponse(found)
        raise ApiError(f"the model {name!r} is not served here", 404, "model", "model_not_found")

    async def chat(self, request: Request) -> Response:
        """Answer a chat completion."""
        return await self.answer(request, "chat")

    async def completions(self, request: Request) -> Response:
        """Answer a completion."""
        return await self.answer(request, "completions")

    def check_key(self, request: Request) -> None:
        """Raise ApiError unless the request has the right key, or none is asked for."""
        if self.options.api_key is None:
            return
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode(), self.options.api_key.encode()):
            raise ApiError(
                "the API key is missing or wrong: send it as 'Authorization: Bearer KEY'", 401, None, "invalid_api_key"
            )

    async def answer(self, request: Request, kind: str) -> Response:
        """Answer a request for texts, and count it when it has ended."""
        begin, generation, path = time.monotonic(), None, request.url.path
        try:
            self.check_key(request)
            if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
                raise ApiError("the Content-Type must be application/json", 415)
            asked = parse_request(await read_body(request), kind, self.model.names)
            generation = Generation(self.model, asked, self.options.timeout)
            generation.start(client_leaves(request))
            answer = Answer(generation)
            if asked.stream:
                events = self.stream(request, answer, begin)
                return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
            response = JSONResponse(await answer.whole())
        except ApiError as error:
            self.ended(request, path, error.status, begin, generation)
            raise
        except (ClientLeftError, ClientDisconnect):
            self.ended(request, path, LEFT, begin, generation)
            return Response(status_code=LEFT)
        except BaseException:
            self.ended(request, path, 500, begin, generation)
            raise
        self.ended(request, path, 200, begin, generation)
        return response

    async def stream(self, request: Request, answer: Answer, begin: float) -> AsyncIterator[bytes]:
        """Yield an answer as server-sent events; an error is the last one."""
        status = LEFT
        try:
            async for chunk in answer.chunks():
                yield server_sent(chunk)
            yield server_sent("[DONE]")
            status = 200
        except ApiError as error:
            status = error.status
            yield server_sent(error.body)
        except ClientLeftError:
            pass
        finally:
            answer.generation.close()
            self.ended(request, request.url.path, status, begin, answer.generation)

    def ended(self, request: Request, path: str, status: int, begin: float, generation: Generation | None) -> None:
        """Count a request, and log it if asked."""
        seconds = time.monotonic() - begin
        self.metrics.count(path, status, seconds, generation)
        if self.options.log_requests:
            fields: dict[str, Any] = {"path": path, "status": status, "seconds": round(seconds, 3)}
            fields["client"] = request.client.host if request.client else None
            if generation is not None:
                fields |= {"prompt_tokens": generation.prompt_tokens, "new_tokens": generation.new_tokens}
                fields["first_token_s"] = generation.first_token_s and round(generation.first_token_s, 3)
            print(json.dumps(fields), flush=True)


class KnownHosts:
    """Refuse requests that name another host, so that no web page reaches the server under a name of its own.

    Parameters
    ----------
    app : ASGI application
    names : sequence of str
    """

    def __init__(self, app: Any, names: Sequence[str]):
        self.app, self.names = app, names

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer with an error in the API's form, or let the application answer."""
        app = self.app
        if scope["type"] == "http":
            given = Headers(scope=scope).get("host", "")
            try:
                known = urlsplit(f"//{given}").hostname in self.names
            except ValueError:
                known = False
            if not known:
                message = (
                    f"the header Host must name {self.names[0]} or {self.names[1]}, got {given!r}: set it in the proxy"
                )
                app = JSONResponse(ApiError(message).body, 400)
        await app(scope, receive, send)


def is_loopback(host: str) -> bool:
    """Decide whether an address reaches this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


async def read_body(request: Request) -> bytes:
    """Read a request's body, of limited size, in limited time."""
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_S):
            async for chunk in request.stream():
                body += chunk
                if len(body) > LARGEST_BODY:
                    raise ApiError(f"the body must be at most {LARGEST_BODY} bytes: send less text", 413)
    except TimeoutError as error:
        raise ApiError(f"the body must arrive within {BODY_S:g} s", 408) from error
    return bytes(body)


async def client_leaves(request: Request) -> None:
    """Wait until the client closes the connection; the body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def api_error(request: Request, error: Any) -> Response:
    """Answer with an error in the API's form."""
    headers = {"Retry-After": "1"} if error.status == 429 else None
    return JSONResponse(error.body, error.status, headers)


async def http_error(request: Request, error: Any) -> Response:
    """Answer an unknown path or method in the API's form."""
    found = ApiError(f"{request.method} {request.url.path}: {error.detail}", error.status_code)
    return JSONResponse(found.body, error.status_code, error.headers)


async def unknown_error(request: Request, error: Exception) -> Response:
    """Answer an error of this program; the server logs it with its traceback."""
    return await api_error(request, ApiError("the server failed; its log says why", 500, None, None, "server_error"))
