"""``/v1/completions``: text or tokens in, their continuation out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from ..models.step import Logprobs
from .logprobs import completion_logprobs
from .openai import CompletionRequest
from .service import Job, Service
from .text import Piece, Token

DEFAULT_MAX_TOKENS = 16


def usage(job: Job) -> dict[str, Any]:
    return {
        "prompt_tokens": job.prompt_tokens,
        "completion_tokens": job.completion_tokens,
        "total_tokens": job.prompt_tokens + job.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": job.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


@dataclass
class _Answer:
    """One choice as it grows."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    finish_reason: str | None = None


class Completion:
    """One request to ``/v1/completions``, from its check to its answer."""

    def __init__(self, service: Service, request: CompletionRequest) -> None:
        self._service = service
        self._request = request
        self._model = service.check_model(request.model)
        self._echoed: set[int] = set()

    async def prepare(self) -> None:
        """Everything that can be refused is refused here, before the first byte of an answer."""
        service, request = self._service, self._request
        request.check()
        special = request.add_special_tokens is not False
        self._prompts = [await service.tokens(prompt, special) for prompt in request.prompts]
        longest = max(len(prompt) for prompt in self._prompts)
        room = service.room(longest, request.max_tokens, DEFAULT_MAX_TOKENS, "prompt")
        service.admit()
        params = request.params(room, logprobs=request.logprobs, prompt_logprobs=self._prompt_logprobs())
        self._job = service.job(
            "cmpl",
            self._prompts,
            params,
            stops=request.stops,
            skip_special_tokens=request.skip_special_tokens,
            show_end=request.include_stop_str_in_output,
            priority=request.priority or 0,
            cache_salt=request.cache_salt or "",
        )
        if request.echo:
            self._texts = await asyncio.to_thread(self._prompt_texts)
            for choice in self._job.choices:
                choice.offset = len(self._texts[choice.index // len(params)])

    def _prompt_logprobs(self) -> int | None:
        return self._request.logprobs if self._request.echo else None

    def _prompt_texts(self) -> list[str]:
        given = self._request.prompts
        decode = self._service.prompts.tokenizer.decode
        return [
            text if isinstance(text, str) else decode(tokens, skip_special_tokens=self._request.skip_special_tokens)
            for text, tokens in zip(given, self._prompts, strict=True)
        ]

    async def answer(self) -> dict[str, Any]:
        answers = [_Answer() for _ in self._job.choices]
        async with aclosing(self._pieces()) as pieces:  # type: ignore[type-var]
            async for piece in pieces:
                if piece is not None:
                    answer = answers[piece.index]
                    answer.text += piece.text
                    answer.tokens += piece.tokens
                    answer.finish_reason = piece.finish_reason
        choices = [
            self._choice(index, each.text, each.tokens, each.finish_reason) for index, each in enumerate(answers)
        ]
        return {**self._head(), "choices": choices, "usage": usage(self._job)}

    async def stream(self) -> AsyncIterator[dict[str, Any] | None]:
        head = self._head() | ({"usage": None} if self._request.include_usage else {})
        async with aclosing(self._pieces()) as pieces:  # type: ignore[type-var]
            async for piece in pieces:
                if piece is None:
                    yield None
                elif piece.text or piece.finish_reason or (piece.tokens and self._request.logprobs is not None):
                    choice = self._choice(piece.index, piece.text, piece.tokens, piece.finish_reason)
                    yield {**head, "choices": [choice]}
        if self._request.include_usage:
            yield {**head, "choices": [], "usage": usage(self._job)}

    async def _pieces(self) -> AsyncIterator[Piece | None]:
        """What the service generates, with the prompt in front where it is echoed."""
        async with aclosing(self._service.generate(self._job)) as generated:  # type: ignore[type-var]
            async for item in generated:
                if item is None:
                    yield None
                    continue
                piece, prompt_logprobs = item
                if self._request.echo and piece.index not in self._echoed:
                    self._echoed.add(piece.index)
                    self._put_prompt_before(piece, prompt_logprobs)
                yield piece

    def _put_prompt_before(self, piece: Piece, logprobs: list[Logprobs]) -> None:
        place = piece.index // (self._request.n or 1)
        piece.text = self._texts[place] + piece.text
        if self._request.logprobs is None:
            return
        echoed, offset = [], 0
        detokenizer = self._service.prompts.tokenizer.detokenizer(skip_special_tokens=self._request.skip_special_tokens)
        for token, found in zip(self._prompts[place], [None, *logprobs], strict=True):
            echoed.append(Token(token, offset, found))
            offset += len(detokenizer.push(token))
        piece.tokens = echoed + piece.tokens

    def _head(self) -> dict[str, Any]:
        return {
            "id": self._job.id,
            "object": "text_completion",
            "created": self._job.created,
            "model": self._model,
            "system_fingerprint": self._service.fingerprint,
        }

    def _choice(self, index: int, text: str, tokens: list[Token], finish_reason: str | None) -> dict[str, Any]:
        wanted = self._request.logprobs is not None
        logprobs = completion_logprobs(tokens, self._service.bytes_of) if wanted else None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}
