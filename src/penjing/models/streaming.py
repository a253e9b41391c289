"""A model whose blocks are in memory one at a time: for texts through models that are larger than memory."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _native
from ..checkpoint import Checkpoint
from ..kernels import KV_TOKENS, Matrix, norm
from .config import Attention, ModelConfig
from .layers import Array
from .step import Chunk
from .weights import (
    Activations,
    BlockWeights,
    load_embedding,
    load_final_norm,
    load_head,
    load_matrix,
    load_weights,
    read_norm,
)

# Tokens that go through a block together: enough for the matrix products, few enough where the MLP is wide.
BATCH_TOKENS = 1024
SPILL_BYTES = 1 << 30  # what more than this goes to a temporary file


@dataclass(frozen=True)
class StreamedBlock:
    """A block's weights in memory."""

    index: int
    weights: BlockWeights


class Stream:
    """The parts of a model, each loaded when it is asked for and freed when the caller drops it.

    Texts are embedded, then run through the blocks in order: blocks that read another's cache (Gemma 4) find what
    that one left.
    """

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig, activations: Activations = "auto") -> None:
        self.checkpoint = checkpoint
        self.config = config
        self.activations: Activations = activations
        mixers = [block.mixer for block in config.blocks]
        self._sources = {mixer.shares_kv_of for mixer in mixers if isinstance(mixer, Attention)} - {None}
        self._kept: dict[int, Any] = {}  # decoders of the blocks whose caches are still to be read
        self._per_layer: Array | None = None

    def embed(self, tokens: NDArray[np.int64], out: Array) -> None:
        """Embeddings of tokens (n,) into ``out`` (n, hidden)."""
        matrix = load_embedding(self.checkpoint, self.config, self.activations)
        for batch in _slices(len(tokens)):
            out[batch] = matrix.decode(tokens[batch]) * np.float32(self.config.embedding_scale)
        self._embed_per_layer(tokens, out)

    def _embed_per_layer(self, tokens: NDArray[np.int64], x: Array) -> None:
        """`config.PerLayerEmbedding`, for all blocks: float32 (n, layers, inner)."""
        config, extra = self.config, self.config.per_layer
        if extra is None:
            return
        width, shape = config.layers * extra.inner, (len(tokens), config.layers, extra.inner)
        table = load_matrix(self.checkpoint, config.stem + extra.table, (extra.vocab_size, width), self.activations)
        projection = load_matrix(
            self.checkpoint, config.stem + extra.projection, (width, config.hidden), self.activations
        )
        weight, bias = read_norm(self.checkpoint, config.stem, extra.norm)
        self._per_layer = _empty(shape)
        for batch in _slices(len(tokens)):
            projected = projection(x[batch]).reshape(-1, extra.inner) * np.float32(config.hidden**-0.5)
            normed = norm(projected, weight, bias, eps=extra.norm.eps, kind=extra.norm.kind)
            own = table.decode(tokens[batch]) * np.float32(extra.scale)
            both = (own + normed.reshape(own.shape)) * np.float32(0.5**0.5)
            self._per_layer[batch] = both.reshape(-1, *shape[1:])

    def blocks(self) -> Iterator[StreamedBlock]:
        """The decoder blocks in order, one in memory at a time."""
        for index in range(self.config.layers):
            yield self.block(index)

    def block(self, index: int) -> StreamedBlock:
        """Decoder block number ``index``."""
        weights = load_weights(self.checkpoint, self.config, index, self.activations)
        return StreamedBlock(index, weights)

    def run(
        self, block: StreamedBlock, x: Array, sizes: Sequence[int], done: Callable[[int], None] | None = None
    ) -> None:
        """Replace x (Σ sizes, hidden), windows of the given sizes one after another, by what the block makes of it.

        Every window starts at position 0 and sees only itself. ``done`` is told how many windows more are computed.
        """
        config = self.config.for_length(max(sizes))
        described = config.blocks[block.index]
        decoder = _native.Decoder(config)
        decoder.add_block(described, *block.weights.native(), shared=0)
        shares = described.mixer.shares_kv_of if isinstance(described.mixer, Attention) else None
        whole = shares is not None or block.index in self._sources  # caches of all windows at once
        tables = _tables(sizes, whole)
        if shares is not None:
            decoder.borrow(self._kept[shares])
        else:
            decoder.reserve(max(int(table[-1]) for table in tables) + 1, "float32", len(sizes))
        if block.index in self._sources:
            self._kept[block.index] = decoder
        self._run_batches(decoder, block.index, x, sizes, tables, done)

    def _run_batches(
        self,
        decoder: Any,
        index: int,
        x: Array,
        sizes: Sequence[int],
        tables: Sequence[NDArray[np.int32]],
        done: Callable[[int], None] | None,
    ) -> None:
        start = window = 0
        for batch in _batches(sizes):
            end = start + sum(batch)
            own = tables[window : window + len(batch)]
            chunks = [
                Chunk(np.empty(size, np.int32), 0, table, slot)
                for slot, (size, table) in enumerate(zip(batch, own, strict=True))
            ]
            extra = None if self._per_layer is None else np.ascontiguousarray(self._per_layer[start:end, index])
            rows = np.ascontiguousarray(x[start:end])
            decoder.run(chunks, rows, extra)
            x[start:end] = rows
            start, window = end, window + len(batch)
            if done is not None:
                done(len(batch))

    def head(self) -> tuple[tuple[Array, Array | None], Matrix]:
        """The last norm (weight and bias) and the matrix (vocabulary, hidden) of the logits."""
        return load_final_norm(self.checkpoint, self.config), load_head(self.checkpoint, self.config, self.activations)

    def logits(self, x: Array, final: tuple[Array, Array | None], head: Matrix) -> Array:
        """Logits (n, vocabulary) of rows (n, hidden) that the last block made; norm and head as from `head`."""
        config = self.config
        logits = head(norm(np.ascontiguousarray(x), *final, eps=config.final_norm.eps, kind=config.final_norm.kind))
        if config.logit_scale != 1:
            logits *= np.float32(config.logit_scale)
        if config.logit_softcap:
            cap = np.float32(config.logit_softcap)
            logits = np.tanh(logits / cap, out=logits)
            logits *= cap
        return logits


def _empty(shape: tuple[int, ...]) -> Array:
    """Float32 memory, in a temporary file if it is large."""
    if 4 * int(np.prod(shape)) <= SPILL_BYTES:
        return np.empty(shape, np.float32)
    with tempfile.TemporaryFile(prefix="penjing-") as file:
        return np.memmap(file, np.float32, "w+", shape=shape)


def _slices(count: int) -> Iterator[slice]:
    return (slice(low, low + BATCH_TOKENS) for low in range(0, count, BATCH_TOKENS))


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


def _tables(sizes: Sequence[int], whole: bool) -> list[NDArray[np.int32]]:
    """Cache blocks of each window: its own, or used again by every batch."""
    tables, next_block = [], 0
    for batch in _batches(sizes):
        next_block = next_block if whole else 0
        for size in batch:
            count = -(-size // KV_TOKENS)
            tables.append(np.arange(next_block, next_block + count, dtype=np.int32))
            next_block += count
    return tables
