"""The engine: the scheduler decides, the model computes and draws; events say what came of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from ..errors import BadInput
from ..kernels import Sampler
from ..models.step import Chunk, Logprobs, Result, StepModel
from .messages import Event, FinishReason, Request, Stats, Timings
from .sampler import sampler_for
from .scheduler import Limits, Scheduler, Work
from .speculate import Speculation


@dataclass
class _Sequence:
    request: Request
    sampler: Sampler
    end_tokens: frozenset[int]
    arrived: float
    admitted: float | None = None
    first_token: float | None = None
    produced: int = 0
    scores: list[Logprobs] = field(default_factory=list)

    @property
    def left(self) -> int:
        return self.request.params.max_tokens - self.produced

    @property
    def scored(self) -> bool:
        """Are log-probabilities of its prompt still to be found?"""
        wanted = self.request.params.prompt_logprobs is not None
        return wanted and self.first_token is None and len(self.scores) < len(self.request.prompt) - 1

    def timings(self, now: float) -> Timings:
        started = now if self.admitted is None else self.admitted
        written_from = now if self.first_token is None else self.first_token
        return Timings(started - self.arrived, written_from - started, now - written_from)


class Engine:
    """``clock``: seconds, from anywhere; only the timings in the events come from it."""

    def __init__(
        self,
        model: StepModel,
        limits: Limits,
        clock: Callable[[], float] = time.monotonic,
        speculation: Speculation | None = None,
    ) -> None:
        self.model = model
        self.limits = limits
        self.scheduler = Scheduler(limits)
        self.speculation = speculation
        self._clock = clock
        self._sequences: dict[str, _Sequence] = {}

    @property
    def has_work(self) -> bool:
        return bool(self._sequences)

    def stats(self) -> Stats:
        scheduler, guesses = self.scheduler, self.speculation
        return Stats(
            running=scheduler.running,
            waiting=scheduler.waiting,
            blocks_used=scheduler.blocks.held,
            blocks=scheduler.blocks.count,
            prefix_queries=scheduler.prefix_queries,
            prefix_hits=scheduler.prefix_hits,
            preemptions=scheduler.preemptions,
            drafts=guesses.drafts if guesses else 0,
            guessed=guesses.guessed if guesses else 0,
            accepted=guesses.accepted if guesses else 0,
        )

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
        ends = frozenset(params.stop_token_ids) | frozenset(() if params.ignore_eos else config.eos_token_ids)
        sampler = sampler_for(params, request.prompt, ends, config.vocab_size)
        self.scheduler.add(
            request.id,
            request.prompt,
            params.max_tokens,
            scored=params.prompt_logprobs is not None,
            priority=request.priority,
            salt=request.cache_salt,
        )
        self._sequences[request.id] = _Sequence(request, sampler, ends, self._clock())

    def abort(self, request_id: str) -> None:
        """Stop computing a request, wherever it is; nothing more is heard of it. Unknown ids are ignored."""
        self._sequences.pop(request_id, None)
        self.scheduler.remove(request_id)
        if self.speculation:
            self.speculation.forget(request_id)

    def step(self) -> list[Event]:
        """Compute once: a token or more for every sequence that writes, and a piece of the prompts that wait."""
        writing = {id: self._sequences[id].left for id in self.scheduler.writing()}
        works = self.scheduler.schedule(self.speculation.wanted(writing) if self.speculation else None)
        if not works:
            return []
        guesses: dict[str, list[int]] = {}
        if self.speculation:
            guesses = self.speculation.guess(works, {each.id: self.scheduler.tokens(each.id) for each in works})
        now = self._clock()
        for each in works:
            sequence = self._sequences[each.id]
            sequence.admitted = now if sequence.admitted is None else sequence.admitted
        chunks = [self._chunk(each, guesses.get(each.id, [])) for each in works]
        try:
            results = self.model.step(chunks)
        except Exception as error:  # whatever it is, these requests end with it, and the engine lives for the next ones
            reason = f"the model failed: {str(error) or type(error).__name__}"
            return [self._fail(each.id, reason) for each in works]
        found = (self._take(*each) for each in zip(works, chunks, results, strict=True))
        return [event for event in found if event is not None]

    def run(self, request: Request) -> Iterator[Event]:
        """Add a request and step until it is done; closing the iterator aborts it."""
        self.add(request)
        try:
            while request.id in self._sequences:
                yield from (event for event in self.step() if event.request_id == request.id)
        finally:
            self.abort(request.id)

    def _chunk(self, work: Work, guesses: list[int]) -> Chunk:
        sequence, end = self._sequences[work.id], work.start + work.count
        known = self.scheduler.tokens(work.id)
        tokens = known[work.start : end]
        draws = work.samples and sequence.request.params.max_tokens > 0
        score = None
        if sequence.scored:
            score = (sequence.request.params.prompt_logprobs or 0, int(known[end]) if end < len(known) else -1)
        return Chunk(
            tokens=np.concatenate([tokens, np.array(guesses, np.int32)]) if guesses else tokens,
            start=work.start,
            table=work.table,
            slot=work.slot,
            sampler=sequence.sampler if draws else None,
            guesses=len(guesses),
            logprobs=sequence.request.params.logprobs if draws else None,
            score=score,
        )

    def _take(self, work: Work, chunk: Chunk, result: Result) -> Event | None:
        """What a result means for its sequence, and the event that tells of it, if there is anything to tell."""
        sequence = self._sequences[work.id]
        self._score(sequence, work, result)
        if result.error is not None:
            return self._fail(work.id, result.error)
        accepted = max(0, len(result.tokens) - 1)
        shareable = self.speculation.checked(work, chunk.guesses, accepted) if self.speculation else None
        tokens = self._until_end(sequence, result.tokens)
        self.scheduler.advance(work.id, work.start + work.count + accepted, tokens, shareable)
        if not work.samples:
            return None
        now = self._clock()
        first = sequence.first_token is None
        if first:
            sequence.first_token = now
        sequence.produced += len(tokens)
        reason = self._reason_to_stop(sequence, tokens)
        event = Event(
            request_id=work.id,
            tokens=tokens,
            logprobs=result.logprobs[: len(tokens)],
            prompt_logprobs=sequence.scores if first else [],
            cached_tokens=self.scheduler.cached(work.id) if first else 0,
            finish_reason=reason,
            timings=sequence.timings(now) if reason else None,
        )
        if reason:
            self.abort(work.id)
        return event

    @staticmethod
    def _score(sequence: _Sequence, work: Work, result: Result) -> None:
        """Keep the log-probabilities of prompt tokens that are not known yet: a part may have been computed twice."""
        first, prompt = work.start + 1, len(sequence.request.prompt)
        known = len(sequence.scores) + 1
        sequence.scores += result.scores[max(0, known - first) : max(0, prompt - first)]

    @staticmethod
    def _until_end(sequence: _Sequence, tokens: list[int]) -> list[int]:
        """Right guesses may have gone beyond the end of the text."""
        for index, token in enumerate(tokens):
            if token in sequence.end_tokens:
                return tokens[: index + 1]
        return tokens

    @staticmethod
    def _reason_to_stop(sequence: _Sequence, tokens: list[int]) -> FinishReason | None:
        if tokens and tokens[-1] in sequence.end_tokens:
            return "stop"
        return None if sequence.left > 0 else "length"

    def _fail(self, id: str, message: str) -> Event:
        timings = self._sequences[id].timings(self._clock())
        self.abort(id)
        return Event(request_id=id, finish_reason="error", error=message, timings=timings)
