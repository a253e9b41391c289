"""A language model that counts, in numpy: fast, deterministic, and strict about how it is called."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np

from penjing.engine.blocks import BLOCK
from penjing.engine.messages import SamplingParams
from penjing.engine.sampler import sampler_for
from penjing.kernels import log_probabilities
from penjing.models.step import Chunk, Logprobs, Result

VOCABULARY = 50
END = 49
BEGINNING = b""


def follow(history: bytes, token: int) -> bytes:
    return hashlib.blake2b(history + bytes([token]), digest_size=8).digest()


@dataclass
class Toy:
    """After the tokens t₁ … tₙ comes most likely (t₁ + n) mod 50; all else in the logits depends on every one of them.

    Its cache holds, for each position of each physical block, the token and a hash of all up to it; a step walks
    through the whole table and fails if the history is not whole. A block that was lost, or written by somebody else,
    or shared with another text, shows.

    peak: how much likelier.  state: keeps the history in slots instead of blocks.  wrong: says something else after
    so many tokens (a draft that is not always right).
    steps: for every step, the number of tokens in each chunk.  broken: raise in the next step.
    """

    peak: float = 10
    state: bool = False
    wrong: int | None = None
    steps: list[list[int]] = field(default_factory=list)
    broken: Exception | None = None
    weights_bytes: int = 1000
    state_bytes: int = 0
    config: SimpleNamespace = field(
        default_factory=lambda: SimpleNamespace(vocab_size=VOCABULARY, eos_token_ids=(END,), max_position=10_000)
    )
    cache: dict[tuple[int, int], tuple[int, bytes]] = field(default_factory=dict)
    slots: dict[int, tuple[int, int, bytes]] = field(default_factory=dict)

    @property
    def has_state(self) -> bool:
        return self.state

    def step(self, chunks: list[Chunk]) -> list[Result]:
        if self.broken:
            error, self.broken = self.broken, None
            raise error
        self.steps.append([len(chunk.tokens) for chunk in chunks])
        written = [block for chunk in chunks for block in self._written(chunk)]
        assert len(written) == len(set(written)), "two sequences write into one block"
        assert not self.state or len({chunk.slot for chunk in chunks}) == len(chunks), "two sequences share a slot"
        return [self._compute(chunk) for chunk in chunks]

    def _written(self, chunk: Chunk) -> list[int]:
        first, last = chunk.start // BLOCK, (chunk.start + len(chunk.tokens) - 1) // BLOCK
        return [int(block) for block in chunk.table[first : last + 1]]

    def _history(self, chunk: Chunk) -> tuple[int, bytes]:
        """The first token and the hash of what is before the chunk."""
        if self.state:
            length, first, history = self.slots.get(chunk.slot, (0, -1, BEGINNING)) if chunk.start else (0, -1, b"")
            assert length == chunk.start, "the state is of another moment"
            return first, history
        first, history = -1, BEGINNING
        for position in range(chunk.start):
            token, after = self.cache[int(chunk.table[position // BLOCK]), position % BLOCK]
            history = follow(history, token)
            assert history == after, f"position {position} holds another text"
            first = token if position == 0 else first
        return first, history

    def _compute(self, chunk: Chunk) -> Result:
        assert len(chunk.tokens) > chunk.guesses
        assert not (self.state and chunk.guesses)
        assert len(chunk.table) * BLOCK >= chunk.start + len(chunk.tokens), "the table is too short"
        first, history = self._history(chunk)
        rows = []
        for index, token in enumerate(chunk.tokens.tolist()):
            position = chunk.start + index
            first = token if position == 0 else first
            history = follow(history, token)
            self.cache[int(chunk.table[position // BLOCK]), position % BLOCK] = token, history
            rows.append(self.row(first, position + 1, history))
        if self.state:
            self.slots[chunk.slot] = chunk.start + len(chunk.tokens), first, history
        result = Result(scores=self._scores(chunk, rows))
        if chunk.sampler is not None:
            error = self._draw(chunk, rows[len(rows) - 1 - chunk.guesses :], result)
            result = Result(result.tokens, result.logprobs, result.scores, error)
        return result

    @staticmethod
    def _draw(chunk: Chunk, rows: list[np.ndarray], result: Result) -> str | None:
        guesses = [*chunk.tokens[len(chunk.tokens) - chunk.guesses :].tolist(), None]
        for row, guess in zip(rows, guesses, strict=True):
            if not np.isfinite(row).all():
                return "the logits are not finite"
            token, _ = chunk.sampler.next(row.copy())
            result.tokens.append(token)
            if chunk.logprobs is not None:
                result.logprobs.append(_logprobs(row, token, chunk.logprobs))
            if token != guess:
                return None
        return None

    @staticmethod
    def _scores(chunk: Chunk, rows: list[np.ndarray]) -> list[Logprobs]:
        if chunk.score is None:
            return []
        alternatives, last = chunk.score
        followers = [*chunk.tokens[1:].tolist(), *([last] if last >= 0 else [])]
        return [_logprobs(row, token, alternatives) for row, token in zip(rows, followers, strict=False)]

    def row(self, first: int, length: int, history: bytes) -> np.ndarray:
        row = np.random.default_rng(int.from_bytes(history, "big")).normal(0, 1, VOCABULARY).astype(np.float32)
        likeliest = first + length
        if self.wrong and length % self.wrong == 0:
            likeliest += 7
        row[likeliest % VOCABULARY] += self.peak
        return row

    def logits(self, tokens: list[int]) -> np.ndarray:
        history = BEGINNING
        for token in tokens:
            history = follow(history, token)
        return self.row(tokens[0], len(tokens), history)

    def text(self, prompt: list[int], params: SamplingParams | int) -> list[int]:
        """What it writes alone, up to the end token: greedy, so many tokens; or as the parameters say."""
        if isinstance(params, int):
            params = SamplingParams(max_tokens=params, temperature=0)
        ends = () if params.ignore_eos else (END,)
        sampler = sampler_for(params, prompt, ends, VOCABULARY)
        tokens = list(prompt)
        while len(tokens) < len(prompt) + params.max_tokens:
            tokens.append(sampler.next(self.logits(tokens))[0])
            if tokens[-1] in ends:
                break
        return tokens[len(prompt) :]


def _logprobs(row: np.ndarray, token: int, alternatives: int) -> Logprobs:
    return Logprobs(*log_probabilities(row, token, alternatives))
