"""What the service knows and does, whatever the interface: admission, generation, state."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..checkpoint import open_checkpoint
from ..engine.client import EngineProcess, Generation
from ..engine.messages import Load, Request, SamplingParams
from ..models import ModelConfig, Outline
from ..models.step import Logprobs
from .errors import APIError, bad_request, context_length_exceeded, model_not_found, overloaded, unavailable
from .metrics import Metrics, Watch
from .prompts import Prompts
from .streaming import PING_SECONDS
from .text import Choice, Piece, TokenBytes

STALLED_SECONDS = 120.0  # an engine with work that has said nothing for so long is not alive
LONGEST_RETRY = 120  # OpenAI's client does not retry at all if it is told to wait longer
LOADING_RETRY = 2


@dataclass(frozen=True)
class Settings:
    """How to serve. names: what clients may call the model, the first of which it calls itself.

    max_num_queued_reqs: sequences that may wait beyond those that compute; 0 for any number.
    shutdown_timeout: seconds that requests in flight have to finish when the server is asked to stop.
    """

    load: Load
    names: tuple[str, ...]
    api_keys: tuple[str, ...] = ()
    max_num_queued_reqs: int = 256
    shutdown_timeout: float = 30.0
    chat_template: Path | None = None


@dataclass
class Job:
    """An admitted request of one or more sequences; ``choices`` are in the order of their index."""

    requests: list[Request]
    choices: list[Choice]
    prompt_tokens: int
    id: str
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def completion_tokens(self) -> int:
        return sum(choice.completion_tokens for choice in self.choices)

    @property
    def cached_tokens(self) -> int:
        """Of the prompts; what the other choices of a prompt find is what the first has just read."""
        pairs = zip(self.requests, self.choices, strict=True)
        return sum(choice.cached_tokens for request, choice in pairs if request.params.choice == 0)


class Service:
    def __init__(self, settings: Settings, prompts: Prompts, config: ModelConfig | Outline) -> None:
        self.settings = settings
        self.prompts = prompts
        self.config = config
        self.created = int(time.time())
        self.engine = EngineProcess(settings.load)
        self.metrics = Metrics(settings.names[0], lambda: self.engine.stats, lambda: self.engine.ready)
        self.bytes_of = TokenBytes(prompts.tokenizer)
        self.fingerprint = _fingerprint(settings.load.folder)
        self.draining = False
        self.active = 0  # HTTP requests that are being answered by the model
        self._sequences = 0
        self._seconds_per_sequence = 1.0  # moving average, for Retry-After

    @property
    def name(self) -> str:
        return self.settings.names[0]

    @property
    def max_model_len(self) -> int:
        return self.engine.ready.max_model_len if self.engine.ready else 0

    def illness(self) -> str | None:
        """Why the service cannot do its work, or None while it can."""
        if self.engine.state in ("new", "loading"):
            return "the model is being loaded"
        if self.engine.state == "dead":
            return self.engine.epitaph
        if (silence := self.engine.silent_seconds()) > STALLED_SECONDS:
            return f"the engine has given no sign for {silence:.0f} s"
        return None

    def check_model(self, name: str | None) -> str:
        """The name under which the answer goes out; raises 404 for a model that is not here."""
        if name is not None and name not in self.settings.names:
            raise model_not_found(name, "`, `".join(self.settings.names))
        return name or self.name

    def check_able(self) -> None:
        """Raise 503 while there is no engine, or no time."""
        if self.draining:
            raise unavailable("The server is shutting down.", "shutting_down", LOADING_RETRY)
        if illness := self.illness():
            loading = self.engine.state in ("new", "loading")
            code = "model_loading" if loading else "engine_unavailable"
            raise unavailable(f"The model cannot answer: {illness}.", code, LOADING_RETRY if loading else None)

    async def tokens(self, prompt: str | list[int], add_special_tokens: bool = True) -> list[int]:
        """Tokens of a prompt; token ids are checked, text is encoded beside the event loop."""
        if isinstance(prompt, str):
            tokens = await asyncio.to_thread(self.prompts.text, prompt, add_special_tokens=add_special_tokens)
        else:
            tokens = prompt
        if not tokens:
            raise bad_request("prompt: it is empty; at least one token is needed", "prompt")
        self.check_tokens(tokens, "prompt")
        return tokens

    def check_tokens(self, tokens: Sequence[int], param: str) -> None:
        size = self.config.vocab_size
        if (largest := max(tokens, default=0)) >= size:
            raise bad_request(f"{param}: token {largest} is outside the vocabulary of {size}", param)

    def room(self, prompt_tokens: int, max_tokens: int | None, default: int | None, param: str) -> int:
        """How many tokens may be written; raises context_length_exceeded if those asked for do not fit."""
        limit = self.max_model_len
        least = 1 if max_tokens is None else max_tokens
        if prompt_tokens + least > limit:
            raise context_length_exceeded(prompt_tokens, least, limit, param)
        left = limit - prompt_tokens
        return max_tokens if max_tokens is not None else min(left, default or left)

    def admit(self) -> None:
        """Raise 429 if too many sequences are waiting already."""
        waiting = self._sequences - self.settings.load.max_num_seqs
        if 0 < self.settings.max_num_queued_reqs <= waiting:
            self.metrics.rejections.inc()
            rounds = 1 + waiting / self.settings.load.max_num_seqs
            raise overloaded(waiting, min(LONGEST_RETRY, max(1, round(rounds * self._seconds_per_sequence))))

    def job(
        self,
        kind: str,
        prompts: Sequence[list[int]],
        params: list[SamplingParams],
        *,
        priority: int = 0,
        cache_salt: str = "",
        **choice: object,
    ) -> Job:
        """One sequence for each prompt and each of the params; ``choice`` are fields of `Choice`."""
        if priority and self.settings.load.scheduling_policy != "priority":
            raise bad_request("priority: this server answers in order of arrival (--scheduling-policy)", "priority")
        for each in (*params[0].logit_bias,):
            self.check_tokens([each], "logit_bias")
        self.check_tokens(params[0].stop_token_ids, "stop_token_ids")
        id = f"{kind}-{uuid.uuid4().hex}"
        pairs = [(prompt, each) for prompt in prompts for each in params]
        requests = [
            Request(f"{id}-{index}", prompt, each, priority, cache_salt) for index, (prompt, each) in enumerate(pairs)
        ]
        choices = [
            Choice(index, self.prompts.tokenizer, prompt, min_tokens=each.min_tokens, **choice)  # type: ignore[arg-type]
            for index, (prompt, each) in enumerate(pairs)
        ]
        return Job(requests, choices, sum(len(prompt) for prompt in prompts), id)

    async def generate(self, job: Job) -> AsyncIterator[tuple[Piece, list[Logprobs]] | None]:
        """Pieces of text with the prompt's log-probabilities, where asked for; None when nothing happens for a while.

        Raises APIError if the engine cannot go on. Sequences that are not done when the caller stops are aborted.
        """
        index = {request.id: place for place, request in enumerate(job.requests)}
        watches = [self.metrics.watch(len(request.prompt)) for request in job.requests]
        self._sequences += len(watches)
        try:
            with Generation(self.engine, job.requests) as generation:
                while generation.unfinished:
                    event = await generation.next(PING_SECONDS)
                    if event is None:
                        yield None
                        continue
                    place = index[event.request_id]
                    choice = job.choices[place]
                    if choice.done:
                        continue
                    watches[place].event(event)
                    if event.error is not None:
                        raise _engine_error(event.error, dead=self.engine.state == "dead" or self.draining)
                    piece = choice.take(event)
                    if piece.finish_reason and not event.finish_reason:  # a stop string
                        generation.abort(event.request_id)
                        watches[place].close("stop")
                    yield piece, event.prompt_logprobs
        finally:
            self._sequences -= len(watches)
            for watch in watches:
                self._learn(watch)

    def _learn(self, watch: Watch) -> None:
        self._seconds_per_sequence += 0.1 * (watch.close("abort") - self._seconds_per_sequence)

    async def drain(self) -> None:
        """Take no new work, let what is in flight finish for the time it has, then end it with an error."""
        self.draining = True
        until = time.monotonic() + self.settings.shutdown_timeout
        while self.active and time.monotonic() < until:
            await asyncio.sleep(0.02)
        self.hurry()
        until = time.monotonic() + 2.0
        while self.active and time.monotonic() < until:
            await asyncio.sleep(0.02)

    def hurry(self) -> None:
        """End everything that is in flight now."""
        self.engine.fail_all("the server is shutting down")


def _engine_error(message: str, *, dead: bool) -> APIError:
    if dead:
        return unavailable(f"The model cannot answer: {message}.", "engine_unavailable")
    return APIError(500, f"The model cannot answer: {message}.", type="server_error", code="engine_error")


def _fingerprint(folder: str) -> str:
    """The same for the same weights on the same version of Penjing."""
    from .. import __version__

    checkpoint = open_checkpoint(folder)
    sizes = sorted((path.name, path.stat().st_size) for path in checkpoint.weight_paths)
    config = json.dumps(checkpoint.config)
    checkpoint.close()
    return "fp_" + hashlib.sha256(json.dumps([__version__, sizes, config]).encode()).hexdigest()[:12]
