"""The HTTP interface: routes, key, bounds of bodies, errors in the form of OpenAI's API, and streams of events."""

import asyncio
import hmac
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from moetrain.files import strict_json, to_json
from moetrain.serve.config import ServeConfig
from moetrain.serve.errors import ApiError
from moetrain.serve.requests import ChatRequest, TextRequest, read_chat, read_text
from moetrain.serve.service import Run, Service

_log = logging.getLogger(__name__)
_SEND_GRACE_S = 30.0  # that a slow reader has after `max_request_s`, before its connection is closed


def build_app(service: Service, config: ServeConfig) -> Starlette:
    """Return the application that answers requests with `service`."""
    door = _Door(service, config)

    async def models(request: Request) -> Response:
        door.check_key(request)
        served = service.served
        card = {"id": served.name, "object": "model", "created": served.created, "owned_by": "moetrain"}
        card |= {"max_model_len": served.max_tokens, "root": served.name, "parent": None}
        if "name" not in request.path_params:
            return _json({"object": "list", "data": [card]})
        if request.path_params["name"] != served.name:
            name = request.path_params["name"][:80]
            raise ApiError(f"the model {name!r} does not exist", status=404, param="model", code="model_not_found")
        return _json(card)

    async def health(request: Request) -> Response:
        return _json({"status": service.status}, status=200 if service.status == "ok" else 503)

    async def metrics(request: Request) -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    routes = [
        Route("/v1/chat/completions", _Endpoint(door, read_chat), methods=["POST"]),
        Route("/v1/completions", _Endpoint(door, read_text), methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", models),
        Route("/health", health),
        Route("/metrics", metrics),
    ]

    async def on_api_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return door.refusal(error)

    async def on_http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        refusal = door.refusal(
            ApiError(f"{request.method} {request.url.path[:80]}: {error.detail}", status=error.status_code)
        )
        refusal.headers.update(error.headers or {})  # which methods are allowed
        return refusal

    return Starlette(routes=routes, exception_handlers={ApiError: on_api_error, HTTPException: on_http_error})


class _Door:
    """Checks that do not depend on the endpoint."""

    def __init__(self, service: Service, config: ServeConfig) -> None:
        self.service = service
        self.config = config

    def check_key(self, request: Request) -> None:
        """Raise ApiError unless the request has the key."""
        key = self.config.key
        if key is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), key.encode()):
            raise ApiError("the key is missing or wrong", status=401, code="invalid_api_key")

    async def body(self, request: Request) -> Mapping[str, Any]:
        """Return the JSON object in the body. Raises ApiError."""
        largest = self.config.max_body_bytes
        too_large = ApiError(f"the body has more than {largest} bytes", status=413, code="body_too_large")
        stated = request.headers.get("content-length", "")
        if stated.isdigit() and int(stated[:20]) > largest:
            raise too_large
        content = bytearray()
        try:
            async with asyncio.timeout(self.config.max_body_s):
                async for part in request.stream():
                    content += part
                    if len(content) > largest:
                        raise too_large
        except TimeoutError:
            message = f"the body did not arrive within {self.config.max_body_s:g} s"
            raise ApiError(message, status=408, code="timeout") from None
        try:
            value = strict_json(content.decode())
        except UnicodeDecodeError as error:
            raise ApiError(f"the body is not UTF-8 at byte {error.start}", code="invalid_json") from None
        except ValueError as error:
            raise ApiError(f"the body is not JSON: {str(error)[:120]}", code="invalid_json") from None
        if not isinstance(value, dict):
            raise ApiError("the body is not a JSON object", code="invalid_json")
        return value

    def refusal(self, error: ApiError) -> Response:
        """Return the response to a request that is not answered."""
        self.service.metrics.count_refusal(error.status)
        return _json(error.body, status=error.status, headers=error.headers)


class _Endpoint:
    """An ASGI application that runs the sequences of one request, and cancels them when its client has gone."""

    def __init__(self, door: _Door, read: Callable[[Mapping[str, Any]], ChatRequest | TextRequest]) -> None:
        self._door = door
        self._read = read

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        has_begun = False

        async def send_noted(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            config = self._door.config
            async with asyncio.timeout(config.max_body_s + config.max_request_s + _SEND_GRACE_S):
                await self._answer(request, send_noted)
        except asyncio.CancelledError:  # the server ends, and the request is still being read
            if not self._door.service.is_draining or has_begun:
                raise
            stopping = ApiError("the server has stopped", status=503, code="stopping", may_retry=True)
            await self._door.refusal(stopping)(scope, receive, send)
        except ClientDisconnect:
            _log.info("a client disconnected before its request was read")
        except TimeoutError:
            _log.warning("a client did not read its response in time: its connection is closed")

    async def _answer(self, request: Request, send: Send) -> None:
        service = self._door.service
        try:
            self._door.check_key(request)
            body = await self._door.body(request)
            deadline = asyncio.get_running_loop().time() + self._door.config.max_request_s
            async with service.within(deadline):
                checked = await asyncio.to_thread(_guarded, self._read, body)
                prompts = await service.prepare(checked)
            with service.run(checked, prompts, deadline=deadline) as run:
                headers = {"x-request-id": run.id}
                if checked.choices.ignored:
                    headers["x-ignored-fields"] = ", ".join(checked.choices.ignored)
                if checked.choices.is_stream:
                    headers |= {"cache-control": "no-cache", "x-accel-buffering": "no"}
                    stream = StreamingResponse(self._events(run), headers=headers, media_type="text/event-stream")
                    await stream(request.scope, request.receive, send)
                    return
                found = await _unless_gone(service.response(run), request.receive)
                if found is None:
                    return
                response = _json(found, headers=headers)
        except ApiError as error:
            response = self._door.refusal(error)
        except ClientDisconnect:
            raise
        except Exception as error:  # a fault of ours must reach neither the client's screen nor other requests
            _log.exception("a request failed")
            response = self._door.refusal(ApiError(f"internal error: {type(error).__name__}", status=500))
        await response(request.scope, request.receive, send)

    async def _events(self, run: Run) -> AsyncIterator[str]:
        """Yield the events of a stream. An error becomes an event, because the status has been sent."""
        try:
            async with aclosing(self._door.service.chunks(run)) as chunks:
                async for chunk in chunks:
                    yield f"data: {to_json(chunk)}\n\n"
        except ApiError as error:
            self._door.service.metrics.count_refusal(error.status)
            yield f"data: {to_json(error.body)}\n\n"
            return
        except Exception as error:  # as above
            _log.exception("a stream failed")
            yield f"data: {to_json(ApiError(f'internal error: {type(error).__name__}', status=500).body)}\n\n"
            return
        yield "data: [DONE]\n\n"


def _guarded(
    read: Callable[[Mapping[str, Any]], ChatRequest | TextRequest], body: Mapping[str, Any]
) -> ChatRequest | TextRequest:
    try:
        return read(body)
    except RecursionError:
        raise ApiError("the body is nested too deeply", code="invalid_json") from None


async def _unless_gone(work: Any, receive: Receive) -> Any:
    """Return the result of a coroutine, or None when the client disconnects first."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, watcher = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for each in (task, watcher):
            each.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


def _json(value: object, *, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return a response of JSON without NaN, which clients cannot parse."""
    return Response(to_json(value), status_code=status, headers=headers, media_type="application/json")
