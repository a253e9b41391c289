"""A model's step, one sequence at a time: for tests that want logits or a greedy text and no engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from penjing.engine.messages import SamplingParams
from penjing.engine.sampler import sampler_for
from penjing.models import Chunk, Model


def table(positions: int, first: int = 0) -> np.ndarray:
    """Consecutive blocks of cache for so many positions."""
    return np.arange(first, first - (-positions // 32), dtype=np.int32)


def chunk(tokens: Any, start: int = 0, first: int = 0, **more: Any) -> Chunk:
    """The next tokens of a sequence in consecutive blocks from ``first`` on."""
    ids = np.ascontiguousarray(tokens, np.int32)
    return Chunk(ids, start, table(start + len(ids), first), **more)


def all_logits(model: Model, tokens: Any, kv_type: str = "float32") -> np.ndarray:
    """Logits (n, vocabulary) of a text from its beginning."""
    model.reserve(len(table(len(tokens))), kv_type, 1)
    return model.logits([chunk(tokens)])[0]


def greedy(model: Model, prompt: Sequence[int], count: int, kv_type: str = "float32") -> list[int]:
    """The next ``count`` tokens, each the likeliest."""
    model.reserve(len(table(len(prompt) + count)), kv_type, 1)
    sampler = sampler_for(SamplingParams(max_tokens=count, temperature=0), prompt, (), model.config.vocab_size)
    written: list[int] = []
    new, start = list(prompt), 0
    while len(written) < count:
        [result] = model.step([chunk(new, start, sampler=sampler)])
        assert result.error is None
        written += result.tokens
        start, new = start + len(new), result.tokens
    return written
