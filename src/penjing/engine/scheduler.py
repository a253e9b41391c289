"""Who computes what in the next step. Knows no tensors and no clock, so that a simulator can drive it.

Continuous batching (Yu et al., "Orca", OSDI 2022) with chunked prefill (Agrawal et al., arXiv 2308.16369): every
step gives one token to each sequence that is writing, and the rest of its room to prompts, oldest first. Sequences
are admitted in the order in which they came; one that does not fit yet waits, and those behind it wait with it, so
that none is passed over for ever. A sequence's whole cache is counted when it is admitted and never grows.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from ..errors import BadInput, OutOfBudget


@dataclass(frozen=True)
class Limits:
    """What the engine may use.

    max_num_seqs: sequences that compute at once.  max_num_batched_tokens: tokens in one step.
    max_model_len: prompt and output of one sequence.  kv_bytes: memory for all caches together.
    mixed_prefill: prompt tokens in a step in which other sequences are writing; bounds how long a prompt holds them up.
    scored_prefill: prompt tokens in a step for a sequence that wants their log-probabilities; bounds the logits.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    kv_bytes: int
    kv_bytes_per_token: int
    mixed_prefill: int = 64
    scored_prefill: int = 64

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_model_len", "mixed_prefill", "scored_prefill"):
            if getattr(self, name) < 1:
                raise BadInput(f"{name}={getattr(self, name)}: at least 1 is needed")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise BadInput(
                f"max_num_batched_tokens={self.max_num_batched_tokens}: each of max_num_seqs={self.max_num_seqs} "
                "sequences needs one token a step"
            )


@dataclass(frozen=True)
class Work:
    """Tokens [start, start + count) of a sequence are to be computed; ``samples``: a new token follows from them."""

    id: str
    start: int
    count: int
    samples: bool


@dataclass
class _Sequence:
    id: str
    prompt: int
    capacity: int
    longest_chunk: int
    computed: int = 0


@dataclass
class Scheduler:
    limits: Limits
    kv_bytes_used: int = 0
    _waiting: deque[_Sequence] = field(default_factory=deque)
    _running: dict[str, _Sequence] = field(default_factory=dict)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    def capacity(self, prompt: int, max_tokens: int) -> int:
        """Positions of cache that a sequence can come to need: the last token it writes is never read back."""
        return prompt + max(max_tokens, 1) - 1

    def add(self, id: str, prompt: int, max_tokens: int, *, scored: bool = False) -> None:
        """Queue a sequence of ``prompt`` tokens that may write ``max_tokens`` more.

        Raises BadInput if it is longer than the model's window, OutOfBudget if no empty engine could hold it.
        """
        limits = self.limits
        if prompt + max_tokens > limits.max_model_len:
            raise BadInput(
                f"{prompt} prompt tokens and max_tokens={max_tokens} are {prompt + max_tokens} tokens; "
                f"max_model_len is {limits.max_model_len}"
            )
        capacity = self.capacity(prompt, max_tokens)
        if capacity * limits.kv_bytes_per_token > limits.kv_bytes:
            raise OutOfBudget(
                f"{capacity} positions of {limits.kv_bytes_per_token} bytes are {capacity * limits.kv_bytes_per_token} "
                f"bytes of cache; the engine has {limits.kv_bytes} for all requests together"
            )
        longest = limits.scored_prefill if scored else limits.max_num_batched_tokens
        self._waiting.append(_Sequence(id, prompt, capacity, longest))

    def admit(self) -> list[tuple[str, int]]:
        """Move sequences that fit from the queue into the batch: their ids and the capacity of their caches."""
        admitted = []
        while self._waiting and len(self._running) < self.limits.max_num_seqs:
            head = self._waiting[0]
            size = head.capacity * self.limits.kv_bytes_per_token
            if self.kv_bytes_used + size > self.limits.kv_bytes:
                break
            self.kv_bytes_used += size
            self._running[head.id] = self._waiting.popleft()
            admitted.append((head.id, head.capacity))
        return admitted

    def schedule(self) -> list[Work]:
        """The next step, for the sequences in the batch. Call `advance` when it is computed."""
        work = [
            Work(each.id, each.computed, 1, samples=True)
            for each in self._running.values()
            if each.computed >= each.prompt
        ]
        room = self.limits.max_num_batched_tokens - len(work)
        if work:
            room = min(room, self.limits.mixed_prefill)
        for each in self._running.values():
            count = min(each.prompt - each.computed, each.longest_chunk, room)
            if count > 0:
                work.append(Work(each.id, each.computed, count, samples=each.computed + count == each.prompt))
                room -= count
        return work

    def advance(self, work: list[Work]) -> None:
        """These tokens are computed."""
        for each in work:
            self._running[each.id].computed += each.count

    def remove(self, id: str) -> bool:
        """Forget a sequence, wherever it is, and free its memory; False if there is none of that id."""
        if (running := self._running.pop(id, None)) is not None:
            self.kv_bytes_used -= running.capacity * self.limits.kv_bytes_per_token
            return True
        for waiting in self._waiting:
            if waiting.id == id:
                self._waiting.remove(waiting)
                return True
        return False
