"""Errors as OpenAI's clients expect them: ``{"error": {message, type, param, code}}`` and a fitting status.

400 BadRequestError · 401 AuthenticationError · 404 NotFoundError · 429 RateLimitError · 5xx InternalServerError in the
official client, which retries 429 and 5xx after ``Retry-After`` seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from starlette.responses import Response


class APIError(Exception):
    """An answer other than success.  extra: more fields in the error object."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})
        self.body = {"error": {"message": message, "type": type, "param": param, "code": code, **(extra or {})}}

    def response(self) -> Response:
        return json_response(self.body, self.status, self.headers)


def json_response(body: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(body), status, headers, media_type="application/json")


def bad_request(message: str, param: str | None = None, code: str | None = None) -> APIError:
    return APIError(400, message, param=param, code=code)


def unsupported(param: str, what: str) -> APIError:
    return APIError(400, f"{param}: {what}", param=param, code="unsupported_parameter")


def invalid_api_key() -> APIError:
    message = "Incorrect API key provided. Send the key the server was started with: 'Authorization: Bearer KEY'."
    return APIError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def model_not_found(name: str, known: str) -> APIError:
    message = f"The model `{name}` does not exist. This server has `{known}`."
    return APIError(404, message, param="model", code="model_not_found")


def context_length_exceeded(prompt: int, completion: int, limit: int, param: str) -> APIError:
    """The wording is OpenAI's: clients look for it."""
    message = (
        f"This model's maximum context length is {limit} tokens. However, you requested {prompt + completion} tokens "
        f"({prompt} in the {param}, {completion} in the completion). "
        f"Please reduce the length of the {param} or completion."
    )
    extra = {"n_prompt_tokens": prompt, "n_ctx": limit}
    return APIError(400, message, param=param, code="context_length_exceeded", extra=extra)


def overloaded(waiting: int, retry_after: int) -> APIError:
    return APIError(
        429,
        f"The server is overloaded: {waiting} requests are waiting. Try again in {retry_after} s.",
        type="rate_limit_error",
        code="rate_limit_exceeded",
        headers={"Retry-After": str(retry_after)},
    )


def unavailable(message: str, code: str, retry_after: int | None = None) -> APIError:
    headers = {"Retry-After": str(retry_after)} if retry_after else {}
    return APIError(503, message, type="service_unavailable", code=code, headers=headers)
