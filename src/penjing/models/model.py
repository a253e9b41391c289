"""A whole model in memory, and the key-value caches of the sequences that it serves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..checkpoint import Checkpoint
from ..errors import BadInput
from ..kernels import attention
from .config import ModelConfig
from .layers import Array, rms_norm
from .weights import load_block, load_embedding, load_final_norm, load_head

Tokens: TypeAlias = NDArray[np.int64]


class KVCache:
    """Keys and values of one sequence: float32 (layers, kv_heads, capacity, head_dim) each, `length` of them filled.

    The memory is the operating system's to give as positions are written, so a generous capacity costs little.
    """

    def __init__(self, config: ModelConfig, capacity: int) -> None:
        if not 1 <= capacity <= config.max_position:
            raise BadInput(f"capacity={capacity} tokens: the model has positions for 1 to {config.max_position}")
        layers = [layer for layer in config.kv_layers if layer is not None]  # alike in the families that are computed
        shape = (config.layers, layers[0].kv_heads, capacity, layers[0].key_dim)
        self.keys, self.values = np.empty(shape, np.float32), np.empty(shape, np.float32)
        self.capacity = capacity
        self.length = 0

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def truncate(self, length: int) -> None:
        """Forget all positions from ``length`` on."""
        if not 0 <= length <= self.length:
            raise BadInput(f"truncate({length}): the cache holds {self.length} positions")
        self.length = length

    def attend(self, layer: int, queries: Array, keys: Array, values: Array, window: int | None) -> Array:
        """Write the keys and values (n, kv_heads, d) behind those that are there, and attend to all of them."""
        end = self.length + len(keys)
        self.keys[layer, :, self.length : end] = keys.swapaxes(0, 1)
        self.values[layer, :, self.length : end] = values.swapaxes(0, 1)
        return attention(queries, self.keys[layer, :, :end], self.values[layer, :, :end], window=window)


@dataclass(frozen=True)
class Chunk:
    """The next tokens (n,) of the sequence whose earlier ones are in ``cache``."""

    tokens: Tokens
    cache: KVCache


class Model:
    """Weights in memory and the computation: tokens in, logits out."""

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig) -> None:
        self.config = config
        self.embedding = load_embedding(checkpoint, config)
        self.blocks = [load_block(checkpoint, config, index) for index in range(config.layers)]
        self.final_norm = load_final_norm(checkpoint, config)
        self.head = self.embedding if config.tied_embeddings else load_head(checkpoint, config)

    @property
    def weights_bytes(self) -> int:
        """Bytes of all weight matrices as they lie in memory."""
        layers = [layer for block in self.blocks for layer in block.linears]
        matrices = {id(matrix): matrix for matrix in (self.embedding, self.head, *(each.matrix for each in layers))}
        return sum(matrix.nbytes for matrix in matrices.values())

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of cache that one position takes."""
        return self.config.kv_bytes_per_token

    def new_cache(self, capacity: int) -> KVCache:
        """An empty cache for a sequence of at most ``capacity`` tokens."""
        return KVCache(self.config, capacity)

    def forward(self, chunks: Sequence[Chunk], *, all_positions: bool = False) -> Array | list[Array]:
        """Compute the chunks in one pass and add them to their caches.

        Returns float32 logits (chunks, vocabulary) of each chunk's last token, or with ``all_positions`` a list of
        (n, vocabulary), one a chunk. Linear layers see all tokens at once. A sequence's logits do not depend on what
        else is in the batch, except for rounding: matrix products may sum in another order for another
        number of rows. Raises BadInput for tokens outside the vocabulary, caches that are too small, no chunks.
        """
        if not chunks:
            raise BadInput("nothing to compute: give at least one chunk")
        for chunk in chunks:
            self._check(chunk)
        sizes = [len(chunk.tokens) for chunk in chunks]
        ends = np.cumsum(sizes)
        tokens = np.concatenate([chunk.tokens for chunk in chunks])
        positions = np.concatenate(
            [np.arange(size) + chunk.cache.length for size, chunk in zip(sizes, chunks, strict=True)]
        )
        x = self.embedding.decode(tokens)
        for index, block in enumerate(self.blocks):
            x = block(x, positions, partial(self._attend, chunks, index, block.window))
        if not all_positions:
            x = x[ends - 1]
        logits = self.head(rms_norm(x, self.final_norm, self.config.final_norm.eps))
        for size, chunk in zip(sizes, chunks, strict=True):
            chunk.cache.length += size
        return np.split(logits, ends[:-1]) if all_positions else logits

    @staticmethod
    def _attend(
        chunks: Sequence[Chunk], layer: int, window: int | None, queries: Array, keys: Array, values: Array
    ) -> Array:
        mixed = np.empty_like(queries)
        start = 0
        for chunk in chunks:
            own = slice(start, start + len(chunk.tokens))
            mixed[own] = chunk.cache.attend(layer, queries[own], keys[own], values[own], window)
            start = own.stop
        return mixed

    def _check(self, chunk: Chunk) -> None:
        tokens, cache = chunk.tokens, chunk.cache
        if tokens.ndim != 1 or not len(tokens):
            raise BadInput(f"a chunk has tokens of shape {tokens.shape}; one or more in a row are needed")
        if cache.length + len(tokens) > cache.capacity:
            raise BadInput(f"{len(tokens)} tokens after {cache.length}: the cache has room for {cache.capacity}")
        if tokens.min() < 0 or tokens.max() >= self.config.vocab_size:
            raise BadInput(
                f"token {tokens.min()} or {tokens.max()} is outside the vocabulary of {self.config.vocab_size}"
            )
