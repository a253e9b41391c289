"""A model whose blocks are in memory one at a time: for texts through models that are larger than memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from ..checkpoint import Checkpoint
from ..kernels import Matrix, attention
from .config import ModelConfig
from .layers import Array, Block, rms_norm
from .weights import load_block, load_embedding, load_final_norm, load_head

# Tokens that go through a block together: enough for the matrix products, few enough where the MLP is wide.
BATCH_TOKENS = 1024


class Stream:
    """The parts of a model, each loaded when it is asked for and freed when the caller drops it."""

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig) -> None:
        self.checkpoint = checkpoint
        self.config = config

    def embed(self, tokens: NDArray[np.int64], out: Array) -> None:
        """Embeddings of tokens (n,) into ``out`` (n, hidden)."""
        matrix = load_embedding(self.checkpoint, self.config)
        for low in range(0, len(tokens), BATCH_TOKENS):
            out[low : low + BATCH_TOKENS] = matrix.decode(tokens[low : low + BATCH_TOKENS])

    def blocks(self) -> Iterator[Block]:
        """The decoder blocks in order, one in memory at a time."""
        for index in range(self.config.layers):
            yield load_block(self.checkpoint, self.config, index)

    def run(self, block: Block, x: Array, sizes: Sequence[int], done: Callable[[int], None] | None = None) -> None:
        """Replace x (Σ sizes, hidden), windows of the given sizes one after another, by what the block makes of it.

        Every window starts at position 0 and sees only itself. ``done`` is told how many windows more are computed.
        """
        start = 0
        for batch in _batches(sizes):
            end = start + sum(batch)
            positions = np.concatenate([np.arange(size) for size in batch])
            x[start:end] = block(np.ascontiguousarray(x[start:end]), positions, partial(_attend, batch, block.window))
            start = end
            if done is not None:
                done(len(batch))

    def head(self) -> tuple[Array, Matrix]:
        """The last norm (hidden,) and the matrix (vocabulary, hidden) of the logits."""
        return load_final_norm(self.checkpoint, self.config), load_head(self.checkpoint, self.config)

    def logits(self, x: Array, norm: Array, head: Matrix) -> Array:
        """Logits (n, vocabulary) of rows (n, hidden) that the last block made; norm and head as from `head`."""
        return head(rms_norm(x, norm, self.config.final_norm.eps))


def _batches(sizes: Sequence[int]) -> Iterator[list[int]]:
    """Consecutive windows in batches of about `BATCH_TOKENS`."""
    batch: list[int] = []
    for size in sizes:
        if batch and sum(batch) + size > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(size)
    if batch:
        yield batch


def _attend(sizes: Sequence[int], window: int | None, queries: Array, keys: Array, values: Array) -> Array:
    mixed = np.empty_like(queries)
    start = 0
    for size in sizes:
        own = slice(start, start + size)
        k, v = (np.ascontiguousarray(each[own].swapaxes(0, 1)) for each in (keys, values))
        mixed[own] = attention(queries[own], k, v, window=window)
        start += size
    return mixed
