"""The HTTP side: routes, what they refuse, and the OpenAPI description."""

from __future__ import annotations

import asyncio
import hmac
import secrets
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi_offline import FastAPIOffline
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic_core import to_json
from starlette.exceptions import HTTPException

from compress.common.errors import nearest
from compress.serve.model import ServedModel, Tokenized, tokenizing_threads
from compress.serve.protocol import (
    ApiError,
    EmbeddingsAnswer,
    EmbeddingsRequest,
    ErrorAnswer,
    answer_of,
    parse_request,
)
from compress.serve.scheduling import ComputeError, Full, Job, retry_after
from compress.serve.settings import Limits
from compress.serve.telemetry import Noted, Telemetry

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
JSON = "application/json"
CLOSED = 499
"""Status of a request whose client has left, as nginx writes it."""
PATHS = ("/v1/embeddings", "/v1/models", "/health", "/ready", "/metrics", "/docs", "/openapi.json")
ASSETS = "/docs-assets"
"""Scripts and styles of `/docs`, which come out of a package, not from a public network."""
OPEN = ("/health", "/ready", "/docs", "/openapi.json")
"""What is answered without a key, and all of `ASSETS`."""
RETRY_SECONDS = 5
ABOUT = """A text embedder behind the OpenAI protocol. `GET /v1/models` says what is served: dimension, longest input, prompts,
licence, fingerprint, and what of the original's accuracy was kept."""


class ClientLeft(Exception):
    """The client has closed the connection."""


class Service:
    """What the routes share."""

    def __init__(self, models: dict[str, ServedModel], limits: Limits, key: str | None, telemetry: Telemetry) -> None:
        """Serve models by name."""
        self.models, self.limits, self.telemetry = models, limits, telemetry
        self.stopping = False
        """Whether the server finishes what it has and takes nothing new."""
        self.open_requests = 0
        """Requests that are not answered yet."""
        self._key = None if key is None else key.encode()
        self._body_bytes = 0
        self._threads = tokenizing_threads()

    @property
    def ready(self) -> bool:
        """Whether all models take texts."""
        return not self.stopping and all(model.ready for model in self.models.values())

    def check_key(self, headers: dict[bytes, bytes]) -> None:
        """See that a request has the key.

        Raises:
            ApiError: 401, it has not.
        """
        if self._key is None:
            return
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self._key):
            said = "send the API key as `Authorization: Bearer KEY`" if not given else "the API key is not the one of this server"
            raise ApiError(401, said, code="invalid_api_key")

    def model_of(self, name: str) -> tuple[ServedModel, str | None]:
        """Return a model, and the prompt's name after `@`.

        Raises:
            ApiError: 404, there is none of that name.
        """
        if name in self.models:
            return self.models[name], None
        plain, at, suffix = name.rpartition("@")
        if at and plain in self.models:
            return self.models[plain], suffix
        shown = nearest(name[:200], self.models)
        raise ApiError(404, f"model {name[:200]!r} is not served here; {shown}", param="model", code="model_not_found")

    async def body(self, request: Request) -> bytes:
        """Read a request's body.

        Raises:
            ApiError: 413, it is too large; 429, too many bodies are being read; 408, it comes too slowly.
            ClientLeft: the connection ended.
        """
        try:
            async with asyncio.timeout(self.limits.read_seconds):
                return await self._read(request)
        except TimeoutError as error:
            said = f"the body did not come within {self.limits.read_seconds:g} s"
            raise ApiError(408, said, code="request_timeout") from error

    async def _read(self, request: Request) -> bytes:
        most = self.limits.body_bytes
        too_large = ApiError(413, f"the body is larger than {most:,} bytes", code="request_too_large")
        length = request.headers.get("content-length", "")
        if length.isdigit() and int(length[:20]) > most:
            raise too_large
        read = bytearray()
        held = 0
        try:
            while True:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise ClientLeft
                part = message.get("body", b"")
                if len(read) + len(part) > most:
                    raise too_large
                if self._body_bytes + len(part) > self.limits.bodies_bytes:
                    raise ApiError(429, "the server is reading as much as it may hold", code="overloaded", retry=1)
                held += len(part)
                self._hold(len(part))
                read += part
                if not message.get("more_body", False):
                    return bytes(read)
        finally:
            self._hold(-held)

    def _hold(self, count: int) -> None:
        self._body_bytes += count
        self.telemetry.bodies.set(self._body_bytes)

    async def embed(self, request: Request, noted: Noted) -> Response:
        """Answer `POST /v1/embeddings`."""
        if self.stopping:
            raise ApiError(503, "the server is stopping", code="stopping", retry=RETRY_SECONDS)
        self.refuse_while_all_are_full()
        body = await self.body(request)
        noted.bytes = len(body)
        asked = parse_request(body)
        del body
        model, suffix = self.model_of(asked.model)
        noted.model = model.name
        if not model.ready:
            raise ApiError(503, f"model {model.name!r} is being opened", code="not_ready", retry=RETRY_SECONDS)
        width = model.width(asked)
        try:
            model.scheduler.check_room()
            loop = asyncio.get_running_loop()
            made: Tokenized = await loop.run_in_executor(self._threads, model.tokenized, asked, suffix)
            noted.items, noted.tokens, noted.prompt = len(made.rows), made.tokens, made.prompt
            job = model.job(made)
            model.scheduler.submit(job)
        except Full as full:
            raise self._refusal(full) from full
        await self._computed(job, request, noted)
        vectors = model.cut(job.vectors, width)
        finite = np.isfinite(vectors).all(axis=1)
        if not finite.all():
            said = f"input: the model gave a vector that is not finite for item {int(np.flatnonzero(~finite)[0])}"
            raise ApiError(500, said, param="input", code="not_finite")
        headers = {"x-model-fingerprint": model.fingerprint}
        return Response(answer_of(vectors, asked.model, made.tokens, asked.encoding_format), headers=headers, media_type=JSON)

    def refuse_while_all_are_full(self) -> None:
        """Refuse a request before it is read where no model has room: under overload reading takes time from computing.

        Raises:
            ApiError: 429, too much waits for every model.
        """
        found: list[Full] = []
        for model in self.models.values():
            try:
                model.scheduler.check_room()
            except Full as full:
                found.append(full)
        if len(found) == len(self.models):
            soonest = min(found, key=lambda full: full.seconds)
            raise self._refusal(soonest) from soonest

    def _refusal(self, full: Full) -> ApiError:
        retry = retry_after(full)
        said = f"more is waiting than can be computed within {self.limits.wait_seconds:g} s; try again in {retry} s"
        return ApiError(429, said, code="rate_limit_exceeded", retry=retry)

    async def _computed(self, job: Job, request: Request, noted: Noted) -> None:
        """Wait until a request is computed, or until its client has left."""
        left = asyncio.ensure_future(_left(request))
        try:
            await asyncio.wait({job.future, left}, return_when=asyncio.FIRST_COMPLETED)
            if not job.future.done():
                raise ClientLeft
            job.future.result()
        except ComputeError as error:
            raise ApiError(500, f"computing failed: {error}", code="compute_failed") from error
        finally:
            left.cancel()
            job.future.cancel()
        now = time.perf_counter()
        started = job.started or now
        noted.queue_ms, noted.compute_ms = round(1000 * (started - job.arrived), 2), round(1000 * (now - started), 2)


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class Envelope:
    """Wraps the routes: the key, a request's id, errors in the protocol's words, the log line."""

    def __init__(self, app: Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]], service: Service) -> None:
        """Wrap an application."""
        self._app, self._service = app, service

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        noted = Noted(id=f"req-{secrets.token_hex(8)}", method=scope["method"][:16], path=_known_path(scope["path"]))
        scope["noted"] = noted

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                noted.status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", noted.id.encode())]
            await send(message)

        self._service.open_requests += 1
        try:
            if scope["path"] not in OPEN and not scope["path"].startswith(f"{ASSETS}/"):
                self._service.check_key(dict(scope["headers"]))
            await self._app(scope, receive, sending)
        except ApiError as error:  # of the key
            noted.error = error.code
            await Response(to_json(error.body()), error.status, error.headers(), JSON)(scope, receive, sending)
        except Exception as error:  # the client has been told; the place is logged, without the message, which may quote a text
            _print_place(error, noted)
        finally:
            self._service.open_requests -= 1
            noted.total_ms = round(1000 * (time.perf_counter() - started), 2)
            self._service.telemetry.answered(noted)


def _known_path(path: str) -> str:
    """Return a path as it is counted: what is not known is one path, so that clients cannot make up metrics."""
    if path.startswith(f"{ASSETS}/"):
        return "/docs"
    return path if path in PATHS else "/v1/models" if path.startswith("/v1/models/") else "other"


def _print_place(error: Exception, noted: Noted) -> None:
    place = "".join(traceback.format_tb(error.__traceback__))
    print(f"{noted.id}: {type(error).__name__}\n{place}", file=sys.stderr, flush=True)


def _answer_errors(app: FastAPI) -> None:
    """Let every error of a route be answered in the protocol's words."""

    def answered(request: Request, error: ApiError) -> Response:
        noted: Noted = request.scope["noted"]
        noted.error = error.code or error.kind
        return Response(to_json(error.body()), error.status, error.headers(), JSON)

    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> Response:
        return answered(request, error)

    @app.exception_handler(ClientLeft)
    async def left(request: Request, _: ClientLeft) -> Response:
        request.scope["noted"].error = "client_left"
        return Response(status_code=CLOSED)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        said = f"{error.detail}: this server has {', '.join(PATHS)}"
        return answered(request, ApiError(error.status_code, said, code="not_found" if error.status_code == 404 else None))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return answered(request, ApiError(400, str(error.errors()[0]["msg"])))

    @app.exception_handler(Exception)
    async def defect(request: Request, _: Exception) -> Response:  # it is raised again then, and logged by the envelope
        return answered(request, ApiError(500, "a defect of the server; it is logged", code="defect"))


def make_app(service: Service) -> Envelope:
    """Return the ASGI application of a service."""
    shown = {"docs_url": "/docs", "redoc_url": None, "openapi_url": "/openapi.json", "static_url": ASSETS}
    app = FastAPIOffline(title="compress serve", description=ABOUT, **shown)
    refusals: dict[int | str, dict[str, Any]] = {
        code: {"model": ErrorAnswer, "description": said}
        for code, said in {
            400: "The request is wrong", 401: "No key, or another one", 404: "No such model", 408: "The body came too slowly",
            413: "The body is too large", 429: "Too much waits", 500: "Computing failed", 503: "Not ready, or stopping",
        }.items()
    }  # fmt: skip
    body = {"required": True, "content": {JSON: {"schema": EmbeddingsRequest.model_json_schema()}}}

    @app.post("/v1/embeddings", response_model=EmbeddingsAnswer, responses=refusals, openapi_extra={"requestBody": body})
    async def embeddings(request: Request) -> Response:
        """Embed texts."""
        return await service.embed(request, request.scope["noted"])

    @app.get("/v1/models", responses={401: refusals[401]})
    async def models() -> dict[str, Any]:
        """List the served models."""
        return {"object": "list", "data": [model.described() for model in service.models.values()]}

    @app.get("/v1/models/{name:path}", responses={code: refusals[code] for code in (401, 404)})
    async def one_model(name: str) -> dict[str, Any]:
        """Describe a served model."""
        return service.model_of(name)[0].described()

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Say that the server is alive."""
        return {"status": "alive"}

    @app.get("/ready", responses={503: {"description": "A model is being opened, or the server is stopping"}})
    async def ready() -> Response:
        """Say whether all models are open and warm."""
        states = {name: model.ready for name, model in service.models.items()}
        body = to_json({"ready": service.ready, "stopping": service.stopping, "models": states})
        return Response(body, 200 if service.ready else 503, media_type=JSON)

    @app.get("/metrics", responses={200: {"content": {"text/plain": {}}}, 401: refusals[401]})
    async def metrics() -> Response:
        """Give the metrics, as Prometheus reads them."""
        return Response(service.telemetry.exposition(service.models.values()), media_type=CONTENT_TYPE_LATEST)

    _answer_errors(app)
    return Envelope(app, service)
