"""A language model that counts, in numpy: fast, deterministic, and strict about how it is called."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np

VOCABULARY = 50
END = 49


@dataclass
class ToyCache:
    capacity: int
    tokens: list[int] = field(default_factory=list)

    @property
    def length(self) -> int:
        return len(self.tokens)


@dataclass
class Toy:
    """After the tokens t₁ … tₙ comes (t₁ + n) mod 50: it needs the whole history, so that a lost cache shows.

    steps: for every call of `forward`, the number of tokens in each chunk.  broken: raise in the next call.
    """

    steps: list[list[int]] = field(default_factory=list)
    broken: Exception | None = None
    caches: int = 0
    config: SimpleNamespace = field(
        default_factory=lambda: SimpleNamespace(vocab_size=VOCABULARY, eos_token_ids=(END,))
    )

    def new_cache(self, capacity: int) -> ToyCache:
        self.caches += 1
        return ToyCache(capacity)

    def forward(self, chunks, *, all_positions: bool = False):
        if self.broken:
            error, self.broken = self.broken, None
            raise error
        self.steps.append([len(chunk.tokens) for chunk in chunks])
        rows = []
        for chunk in chunks:
            own = []
            for token in chunk.tokens:
                chunk.cache.tokens.append(int(token))
                own.append(self.logits(chunk.cache.tokens))
            assert chunk.cache.length <= chunk.cache.capacity
            rows.append(np.array(own))
        return rows if all_positions else np.array([own[-1] for own in rows])

    @staticmethod
    def next(tokens: list[int]) -> int:
        return (tokens[0] + len(tokens)) % VOCABULARY

    @classmethod
    def logits(cls, tokens: list[int]) -> np.ndarray:
        row = np.random.default_rng(len(tokens)).normal(0, 1, VOCABULARY).astype(np.float32)
        row[cls.next(tokens)] = 10
        return row

    @classmethod
    def text(cls, prompt: list[int], count: int) -> list[int]:
        """What greedy decoding writes, up to the end token."""
        tokens = list(prompt)
        while len(tokens) < len(prompt) + count and (len(tokens) == len(prompt) or tokens[-1] != END):
            tokens.append(cls.next(tokens))
        return tokens[len(prompt) :]
