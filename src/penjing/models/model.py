"""A whole model in memory: tokens in, the next tokens out, one native call a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .. import _native
from ..checkpoint import Checkpoint
from ..errors import BadInput
from ..kernels import Matrix
from .cache import WeightCache
from .config import Attention, ModelConfig
from .layers import Array
from .step import Chunk, Logprobs, Result
from .weights import (
    Activations,
    load_embedding,
    load_final_norm,
    load_head,
    load_matrix,
    load_screen,
    load_weights,
    read_norm,
)


class Model:
    """Weights in memory and the computation.

    A sequence's keys and values lie in cache blocks of `kernels.KV_TOKENS` positions, wherever its table says; models
    with a recurrent state (`has_state`) keep that in slots. Who owns which blocks and slots is the caller's to decide.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: ModelConfig,
        activations: Activations = "auto",
        length: int | None = None,
        cache: WeightCache | None = None,
        screen: bool = False,
    ) -> None:
        """length: of the longest sequence; rotary positions of some families depend on it.  cache: where packed
        matrices are kept.  screen: see `load`."""
        self.from_cache = cache is not None and cache.hit
        self.config = config.for_length(config.max_position if length is None else length)
        self.embedding = load_embedding(checkpoint, config, activations, cache)
        self.head = self.embedding if config.tied_embeddings else load_head(checkpoint, config, activations, cache)
        self.screen = load_screen(config, self.head, cache) if screen else None
        self.final_norm = load_final_norm(checkpoint, config)
        self.weights = [
            load_weights(checkpoint, self.config, index, activations, cache) for index in range(config.layers)
        ]
        self._decoder = _native.Decoder(
            self.config,
            self.embedding.native,
            (self.head.native, None),
            self.final_norm,
            None if self.screen is None else self.screen.native,
        )
        self._more = self._add_per_layer(checkpoint, activations, cache)
        caches = cache_numbers(self.config)
        for block, weights in zip(self.config.blocks, self.weights, strict=True):
            shares = block.mixer.shares_kv_of if isinstance(block.mixer, Attention) else None
            self._decoder.add_block(block, *weights.native(), shared=-1 if shares is None else caches[shares])

    def _add_per_layer(
        self, checkpoint: Checkpoint, activations: Activations, cache: WeightCache | None
    ) -> list[Matrix]:
        config, extra = self.config, self.config.per_layer
        if extra is None:
            return []
        width = config.layers * extra.inner
        table = load_matrix(checkpoint, config.stem + extra.table, (extra.vocab_size, width), activations, cache)
        projection = load_matrix(checkpoint, config.stem + extra.projection, (width, config.hidden), activations, cache)
        norm = read_norm(checkpoint, config.stem, extra.norm)
        self._decoder.set_per_layer(extra, config.layers, table.native, (projection.native, None), norm)
        return [table, projection]

    @property
    def weights_bytes(self) -> int:
        """Bytes of all weight matrices as they lie in memory, the head's screen too."""
        blocks = [matrix for weights in self.weights for matrix in weights.matrices]
        more = self._more if self.screen is None else [self.screen, *self._more]
        matrices = {id(matrix): matrix for matrix in (self.embedding, self.head, *more, *blocks)}
        return sum(matrix.nbytes for matrix in matrices.values())

    @property
    def read_bytes(self) -> int:
        """Of the weights that the likeliest token of one sequence reads: all but the embedding, of which it is one row,
        and, beside a screen, the head, of which it is few."""
        used = {id(self.head)} if self.screen is None else set()
        unread = {id(matrix): matrix.nbytes for matrix in (self.embedding, self.head) if id(matrix) not in used}
        return self.weights_bytes - sum(unread.values())

    @property
    def has_state(self) -> bool:
        return self.state_bytes > 0

    @property
    def state_bytes(self) -> int:
        """Of a slot."""
        return self._decoder.state_bytes

    def block_bytes(self, kv_type: str) -> int:
        """A cache block of all layers; kv_type: float32, float16, bfloat16, int8 or int4."""
        return self._decoder.block_bytes(kv_type)

    def activation_bytes(self, tokens: int) -> int:
        """What a step of so many tokens works in, besides weights and caches; kept for the next steps."""
        return self._decoder.activation_bytes(tokens)

    def reserve(self, blocks: int, kv_type: str = "float16", slots: int = 0) -> None:
        """The memory of all caches and states, in place of what was there; taken as it is first written.

        Raises BadInput for numbers and types that cannot be, MemoryError.
        """
        try:
            self._decoder.reserve(blocks, kv_type, slots)
        except ValueError as error:
            raise BadInput(str(error)) from None

    def step(self, chunks: Sequence[Chunk]) -> list[Result]:
        """Compute the chunks, draw and score: a result each.

        A sequence's results do not depend on what else is in the step, nor on how its tokens are cut into chunks: on
        integer layers and float caches, bit for bit. Raises BadInput, before anything is computed, for tokens outside
        the vocabulary, tables that are too short and blocks or slots that are not there.
        """
        try:
            found = self._decoder.step(chunks)
        except ValueError as error:
            raise BadInput(str(error)) from None
        return [Result(tokens, _logprobs(drawn), _logprobs(scores), error) for tokens, drawn, scores, error in found]

    def logits(self, chunks: Sequence[Chunk]) -> list[Array]:
        """Logits of every position, (n, vocabulary) a chunk; for tests and tools."""
        try:
            rows = self._decoder.logits(chunks)
        except ValueError as error:
            raise BadInput(str(error)) from None
        return np.split(rows, np.cumsum([len(chunk.tokens) for chunk in chunks])[:-1])


def cache_numbers(config: ModelConfig) -> list[int]:
    """Of each block's layer in the cache; −1 for those that keep none."""
    kept = [layer is not None for layer in config.kv_layers]
    return [sum(kept[:index]) if own else -1 for index, own in enumerate(kept)]


def _logprobs(found: list[tuple[float, list[tuple[int, float]]]]) -> list[Any]:
    return [Logprobs(chosen, top) for chosen, top in found]
