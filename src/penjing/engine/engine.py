"""The engine: the scheduler decides, the model computes, the samplers choose."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import BadInput, PenjingError
from ..models import Chunk
from .messages import Event, FinishReason, Logprobs, Request, Stats, Timings
from .sampler import Sampler, logprobs
from .scheduler import Limits, Scheduler, Work


class LanguageModel(Protocol):
    """What the engine asks of a model; `penjing.models.Model` is one."""

    @property
    def config(self) -> Any:
        """With vocab_size and eos_token_ids."""

    def new_cache(self, capacity: int) -> Any: ...

    def forward(self, chunks: Sequence[Chunk], *, all_positions: bool = False) -> Any: ...


@dataclass
class _Sequence:
    request: Request
    sampler: Sampler
    end_tokens: frozenset[int]
    tokens: list[int]
    arrived: float
    admitted: float = 0.0
    first_token: float | None = None
    cache: Any = None
    prompt_logprobs: list[Logprobs] = field(default_factory=list)

    @property
    def produced(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    def timings(self, now: float) -> Timings:
        started = self.admitted or now
        written_from = now if self.first_token is None else self.first_token
        return Timings(started - self.arrived, written_from - started, now - written_from)


class Engine:
    """``clock``: seconds, from anywhere; only the timings in the events come from it."""

    def __init__(self, model: LanguageModel, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self.model = model
        self.limits = limits
        self.scheduler = Scheduler(limits)
        self._clock = clock
        self._sequences: dict[str, _Sequence] = {}

    @property
    def has_work(self) -> bool:
        return bool(self._sequences)

    def stats(self) -> Stats:
        scheduler = self.scheduler
        return Stats(scheduler.running, scheduler.waiting, scheduler.kv_bytes_used, self.limits.kv_bytes)

    def add(self, request: Request) -> None:
        """Queue a request. Raises BadInput for what cannot be computed, OutOfBudget for what can never fit."""
        config, params = self.model.config, request.params
        named = [*request.prompt, *params.logit_bias, *params.stop_token_ids]
        if not request.prompt:
            raise BadInput("the prompt is empty; at least one token is needed")
        if max(named) >= config.vocab_size or min(named) < 0:
            wrong = next(token for token in named if not 0 <= token < config.vocab_size)
            raise BadInput(f"token {wrong} is outside the vocabulary of {config.vocab_size}")
        if request.id in self._sequences:
            raise BadInput(f"request {request.id!r} is already there")
        self.scheduler.add(
            request.id, len(request.prompt), params.max_tokens, scored=params.prompt_logprobs is not None
        )
        ends = frozenset(params.stop_token_ids) | frozenset(() if params.ignore_eos else config.eos_token_ids)
        sampler = Sampler(params, request.prompt, ends, config.vocab_size)
        self._sequences[request.id] = _Sequence(request, sampler, ends, list(request.prompt), self._clock())

    def abort(self, request_id: str) -> None:
        """Stop computing a request, wherever it is; nothing more is heard of it. Unknown ids are ignored."""
        self._sequences.pop(request_id, None)
        self.scheduler.remove(request_id)

    def step(self) -> list[Event]:
        """Compute once: a token for every sequence that writes, and a piece of the prompts that wait."""
        events = self._admit()
        work = self.scheduler.schedule()
        plain = [each for each in work if not self._scored(each)]
        scored = [each for each in work if self._scored(each)]
        for group in (plain, scored):
            if group:
                events += self._compute(group, all_positions=group is scored)
        return events

    def run(self, request: Request) -> Iterator[Event]:
        """Add a request and step until it is done; closing the iterator aborts it."""
        self.add(request)
        try:
            while self.has_work:
                yield from (event for event in self.step() if event.request_id == request.id)
        finally:
            self.abort(request.id)

    def _scored(self, work: Work) -> bool:
        sequence = self._sequences[work.id]
        wants = sequence.request.params.prompt_logprobs is not None
        return wants and work.start < len(sequence.request.prompt)

    def _admit(self) -> list[Event]:
        events = []
        for id, capacity in self.scheduler.admit():
            sequence = self._sequences[id]
            sequence.admitted = self._clock()
            try:
                sequence.cache = self.model.new_cache(capacity)
            except MemoryError:
                events.append(self._fail(id, f"no memory for a cache of {capacity} tokens"))
        return events

    def _compute(self, group: list[Work], *, all_positions: bool) -> list[Event]:
        chunks = []
        for each in group:
            sequence = self._sequences[each.id]
            tokens = np.array(sequence.tokens[each.start : each.start + each.count], np.int64)
            chunks.append(Chunk(tokens, sequence.cache))
        try:
            logits = self.model.forward(chunks, all_positions=all_positions)
        except (PenjingError, MemoryError, ArithmeticError) as error:
            return [self._fail(each.id, f"the model failed: {error or type(error).__name__}") for each in group]
        self.scheduler.advance(group)
        events = []
        for each, row in zip(group, logits, strict=True):
            if all_positions:
                self._score(each, row)
                row = row[-1]
            if each.samples:
                events.append(self._continue(each.id, row))
        return events

    def _score(self, work: Work, logits: NDArray[np.float32]) -> None:
        """Log-probabilities of the prompt tokens that follow those of this piece."""
        sequence = self._sequences[work.id]
        followers = sequence.request.prompt[work.start + 1 : work.start + work.count + 1]
        wanted = sequence.request.params.prompt_logprobs or 0
        sequence.prompt_logprobs += [
            logprobs(row, token, wanted) for row, token in zip(logits, followers, strict=False)
        ]

    def _continue(self, id: str, logits: NDArray[np.float32]) -> Event:
        sequence = self._sequences[id]
        tokens: list[int] = []
        chosen: list[Logprobs] = []
        if sequence.request.params.max_tokens:
            try:
                token, found = sequence.sampler(logits)
            except PenjingError as error:
                return self._fail(id, str(error))
            sequence.tokens.append(token)
            tokens, chosen = [token], [found] if found else []
        prompt_logprobs, sequence.prompt_logprobs = sequence.prompt_logprobs, []
        now = self._clock()
        if sequence.first_token is None:
            sequence.first_token = now
        reason = self._reason_to_stop(sequence)
        if reason:
            self.abort(id)
        return Event(
            request_id=id,
            tokens=tokens,
            logprobs=chosen,
            prompt_logprobs=prompt_logprobs,
            finish_reason=reason,
            timings=sequence.timings(now) if reason else None,
        )

    @staticmethod
    def _reason_to_stop(sequence: _Sequence) -> FinishReason | None:
        if sequence.produced and sequence.tokens[-1] in sequence.end_tokens:
            return "stop"
        return "length" if sequence.produced >= sequence.request.params.max_tokens else None

    def _fail(self, id: str, message: str) -> Event:
        timings = self._sequences[id].timings(self._clock())
        self.abort(id)
        return Event(request_id=id, finish_reason="error", error=message, timings=timings)
