"""The routes, and what holds for all of them: keys, request ids, errors as JSON."""

from __future__ import annotations

import hmac
import logging
import re
import uuid
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .. import __version__
from ..errors import BadInput
from .chat import Chat
from .completions import Completion
from .errors import APIError, bad_request, invalid_api_key, json_response, model_not_found, unavailable
from .openai import AnyRequest, ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest, parse
from .service import Service
from .streaming import EventStream, until_disconnect

log = logging.getLogger("penjing.serve")
OPEN_TO_ALL = ("/health", "/health/ready", "/ping")
MAX_BODY_BYTES = 32 << 20
MAX_IGNORED = 100  # names of unknown fields that are remembered, so that each is logged once
GONE = 499  # nobody reads it; the name that proxies have for it


def create_app(service: Service) -> Starlette:
    app = Starlette(
        routes=[*_service_routes(service), *_model_routes(service), *_token_routes(service)],
        middleware=[Middleware(Gate, service=service)],
        exception_handlers={
            APIError: _api_error,
            HTTPException: _http_error,
            ClientDisconnect: _gone,
            Exception: _crash,
        },
    )
    app.router.redirect_slashes = False
    app.state.ignored = set()
    return app


def _service_routes(service: Service) -> list[Route]:
    async def health(request: Request) -> Response:
        if illness := service.illness():
            raise unavailable(f"{illness[0].upper()}{illness[1:]}.", "unhealthy")
        return json_response({"status": "ok"})

    async def ready(request: Request) -> Response:
        service.check_able()
        return json_response({"status": "ready"})

    async def version(request: Request) -> Response:
        return json_response({"version": __version__})

    async def metrics(request: Request) -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return [
        Route("/health", health),
        Route("/ping", health),
        Route("/health/ready", ready),
        Route("/version", version),
        Route("/metrics", metrics),
    ]


def _model_routes(service: Service) -> list[Route]:
    def model(name: str) -> dict[str, Any]:
        about = {"id": name, "object": "model", "created": service.created, "owned_by": "penjing"}
        return {**about, "root": service.name, "max_model_len": service.max_model_len or None}

    async def models(request: Request) -> Response:
        return json_response({"object": "list", "data": [model(name) for name in service.settings.names]})

    async def one_model(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in service.settings.names:
            raise model_not_found(name, "`, `".join(service.settings.names))
        return json_response(model(name))

    async def completions(request: Request) -> Response:
        return await _generate(request, service, CompletionRequest, Completion)

    async def chat_completions(request: Request) -> Response:
        return await _generate(request, service, ChatRequest, Chat)

    return [
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", one_model),
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/chat/completions", chat_completions, methods=["POST"]),
    ]


async def _generate(
    request: Request,
    service: Service,
    kind: type[CompletionRequest] | type[ChatRequest],
    task: type[Completion] | type[Chat],
) -> Response:
    asked: Any = await _read(request, kind)
    service.check_able()
    work: Any = task(service, asked)
    await work.prepare()
    if asked.stream:
        return EventStream(work.stream())
    return json_response(await until_disconnect(request.receive, work.answer()))


def _token_routes(service: Service) -> list[Route]:
    async def tokenize(request: Request) -> Response:
        asked = await _read(request, TokenizeRequest)
        service.check_model(asked.model)
        if (asked.prompt is None) == (asked.messages is None):
            raise bad_request("give either prompt or messages", "prompt")
        if asked.prompt is not None:
            tokens = service.prompts.text(asked.prompt, add_special_tokens=asked.add_special_tokens is not False)
        else:
            try:
                tokens = service.prompts.chat(
                    [message.plain() for message in asked.messages or ()],
                    add_generation_prompt=asked.add_generation_prompt,
                    add_special_tokens=asked.add_special_tokens,
                    variables=asked.chat_template_kwargs,
                )
            except BadInput as error:
                raise bad_request(str(error), "messages") from None
        answer: dict[str, Any] = {
            "count": len(tokens),
            "max_model_len": service.max_model_len or None,
            "tokens": tokens,
        }
        if asked.return_token_strs:
            answer["token_strs"] = [service.bytes_of(token).decode(errors="replace") for token in tokens]
        return json_response(answer)

    async def detokenize(request: Request) -> Response:
        asked = await _read(request, DetokenizeRequest)
        service.check_model(asked.model)
        service.check_tokens(asked.tokens, "tokens")
        text = service.prompts.tokenizer.decode(asked.tokens, skip_special_tokens=False)
        return json_response({"prompt": text})

    return [
        Route("/tokenize", tokenize, methods=["POST"]),
        Route("/detokenize", detokenize, methods=["POST"]),
    ]


async def _read(request: Request, kind: type[AnyRequest]) -> AnyRequest:
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY_BYTES:
            raise APIError(413, f"The body is larger than {MAX_BODY_BYTES >> 20} MiB.", code="request_too_large")
    parsed, ignored = parse(bytes(body), kind)
    told: set[str] = request.app.state.ignored
    if new := sorted(ignored - told)[: MAX_IGNORED - len(told)]:
        log.info("fields that are ignored: %s", ", ".join(name[:64] for name in new))
        told.update(new)
    return parsed


def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, APIError)
    return error.response()


def _http_error(request: Request, error: Exception) -> Response:
    """Routes that are not there, methods that a route does not have."""
    assert isinstance(error, HTTPException)
    message = f"{error.detail}: {request.method} {request.url.path}"
    return APIError(error.status_code, message, code=None, headers=error.headers).response()


def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=GONE)


def _crash(request: Request, error: Exception) -> Response:
    return APIError(500, "The server failed; its log says how.", type="server_error", code="internal_error").response()


class Gate:
    """Stands before every route: the key, an x-request-id on every answer, and the count of what is in flight."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service
        self._keys = [key.encode() for key in service.settings.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if re.fullmatch(r"[\x21-\x7e]{1,128}", given) else uuid.uuid4().hex

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        if not self._allowed(scope["path"], headers):
            await invalid_api_key().response()(scope, receive, send_with_id)
            return
        works = scope["method"] == "POST" and scope["path"].startswith("/v1/")
        self._service.active += works
        try:
            await self._app(scope, receive, send_with_id)
        finally:
            self._service.active -= works

    def _allowed(self, path: str, headers: Headers) -> bool:
        if not self._keys or path in OPEN_TO_ALL:
            return True
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = key.strip().encode("latin-1", errors="replace") if scheme.lower() == "bearer" else b""
        # Every key is compared, each in constant time, so that the time tells nothing.
        return sum([hmac.compare_digest(given, key) for key in self._keys]) > 0
