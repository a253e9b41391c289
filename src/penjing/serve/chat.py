"""``/v1/chat/completions``: a conversation in, the next message out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from ..errors import BadInput
from .completions import usage
from .errors import bad_request
from .logprobs import chat_logprobs
from .openai import ChatRequest
from .service import Service
from .text import Token


class Chat:
    """One request to ``/v1/chat/completions``, from its check to its answer."""

    def __init__(self, service: Service, request: ChatRequest) -> None:
        self._service = service
        self._request = request
        self._model = service.check_model(request.model)

    async def prepare(self) -> None:
        """Everything that can be refused is refused here, before the first byte of an answer."""
        service, request = self._service, self._request
        request.check()
        try:
            prompt = await asyncio.to_thread(
                service.prompts.chat,
                [message.plain() for message in request.messages],
                add_generation_prompt=request.add_generation_prompt,
                add_special_tokens=request.add_special_tokens,
                variables=request.chat_template_kwargs,
            )
        except BadInput as error:
            raise bad_request(str(error), "messages") from None
        if not prompt:
            raise bad_request("messages: they are empty; at least one token is needed", "messages")
        room = service.room(len(prompt), request.limit, None, "messages")
        service.admit()
        self._job = service.job(
            "chatcmpl",
            [prompt],
            request.params(room, logprobs=request.alternatives),
            stops=request.stops,
            skip_special_tokens=request.skip_special_tokens,
            show_end=request.include_stop_str_in_output,
            priority=request.priority or 0,
            cache_salt=request.cache_salt or "",
        )

    async def answer(self) -> dict[str, Any]:
        texts = ["" for _ in self._job.choices]
        tokens: list[list[Token]] = [[] for _ in self._job.choices]
        reasons: list[str | None] = [None for _ in self._job.choices]
        async with aclosing(self._service.generate(self._job)) as generated:  # type: ignore[type-var]
            async for item in generated:
                if item is not None:
                    piece = item[0]
                    texts[piece.index] += piece.text
                    tokens[piece.index] += piece.tokens
                    reasons[piece.index] = piece.finish_reason
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": text, "refusal": None},
                "logprobs": self._logprobs(tokens[index]),
                "finish_reason": reasons[index],
            }
            for index, text in enumerate(texts)
        ]
        return {**self._head("chat.completion"), "choices": choices, "usage": usage(self._job)}

    async def stream(self) -> AsyncIterator[dict[str, Any] | None]:
        """The role first, then the content, then the finish_reason alone: some clients want them apart."""
        head = self._head("chat.completion.chunk") | ({"usage": None} if self._request.include_usage else {})

        def chunk(
            index: int, delta: dict[str, Any], tokens: list[Token] | None = None, reason: str | None = None
        ) -> Any:
            logprobs = self._logprobs(tokens) if tokens else None
            choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
            return {**head, "choices": [choice]}

        for choice in self._job.choices:
            yield chunk(choice.index, {"role": "assistant", "content": ""})
        async with aclosing(self._service.generate(self._job)) as generated:  # type: ignore[type-var]
            async for item in generated:
                if item is None:
                    yield None
                    continue
                piece = item[0]
                if piece.text or (piece.tokens and self._request.logprobs):
                    yield chunk(piece.index, {"content": piece.text}, piece.tokens)
                if piece.finish_reason:
                    yield chunk(piece.index, {}, reason=piece.finish_reason)
        if self._request.include_usage:
            yield {**head, "choices": [], "usage": usage(self._job)}

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self._job.id,
            "object": kind,
            "created": self._job.created,
            "model": self._model,
            "system_fingerprint": self._service.fingerprint,
        }

    def _logprobs(self, tokens: list[Token]) -> dict[str, Any] | None:
        return chat_logprobs(tokens, self._service.bytes_of) if self._request.logprobs else None
