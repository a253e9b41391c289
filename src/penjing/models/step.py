"""What goes into one step of a model and what comes out of it: plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Chunk:
    """The next tokens of one sequence.

    tokens: int32 (n,), guesses last.  start: the position of the first.  table: int32 (blocks,), the physical cache
    blocks of the sequence in order, enough for ``start + n`` positions.  slot: where the state of the sequence is, for
    families that have one; a chunk with ``start == 0`` clears it.
    sampler: draws what follows (a native `Sampler`); None fills the cache only.  guesses: how many of the last tokens
    are guesses at what the sampler will draw.  logprobs: alternatives wanted beside each drawn token, None for no
    log-probabilities.  score: (alternatives, the token that follows the chunk, or −1 for none): log-probabilities of
    each token's follower.
    """

    tokens: NDArray[np.int32]
    start: int
    table: NDArray[np.int32]
    slot: int = 0
    sampler: Any = None
    guesses: int = 0
    logprobs: int | None = None
    score: tuple[int, int] | None = None


class Logprobs(msgspec.Struct, frozen=True, array_like=True):
    """Natural log-probabilities of the token that stands there and of the likeliest ones, best first."""

    chosen: float
    top: list[tuple[int, float]]


@dataclass(frozen=True)
class Result:
    """What a step found for one chunk.

    tokens: drawn ones: with g guesses 1 to g + 1, without a sampler none.  logprobs: one a drawn token, if wanted.
    scores: one a follower, if wanted: n, or n − 1 when the one after the chunk is not known.  error: why this sequence
    cannot go on (its logits are not finite), while the others of the step can.
    """

    tokens: list[int] = field(default_factory=list)
    logprobs: list[Logprobs] = field(default_factory=list)
    scores: list[Logprobs] = field(default_factory=list)
    error: str | None = None


class StepModel(Protocol):
    """What an engine asks of a model; `penjing.models.Model` is one.

    weights_bytes: as they lie in memory.  has_state, state_bytes: a recurrent state of so many bytes a slot, which
    cannot be taken back.
    """

    @property
    def config(self) -> Any:
        """With vocab_size, max_position and eos_token_ids."""

    @property
    def weights_bytes(self) -> int: ...

    @property
    def has_state(self) -> bool: ...

    @property
    def state_bytes(self) -> int: ...

    def block_bytes(self, kv_type: str) -> int:
        """Bytes of one block of cache, of all layers."""

    def activation_bytes(self, tokens: int) -> int:
        """The most that a step of so many tokens holds beside weights and caches."""

    def reserve(self, blocks: int, kv_type: str, slots: int) -> None:
        """Set aside the cache, and slots for recurrent state. The memory is touched as it is written."""

    def step(self, chunks: Sequence[Chunk]) -> list[Result]:
        """Compute all chunks at once."""
