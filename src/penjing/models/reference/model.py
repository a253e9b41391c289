"""A whole model, block by block."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...checkpoint import Checkpoint, Weight
from ...formats.mxfp4 import Mxfp4Tensor
from ..config import Block, Linear, Mlp, ModelConfig
from ..weights import read_bias, read_norm, read_vector, read_weight
from .experts import mixture
from .layers import Array, Parts, activate, gated, normed, softcap
from .mixers import mix


class Reference:
    """Tokens in, logits out; a block's weights are in memory while it computes."""

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig, dtype: Any = np.float32) -> None:
        self.checkpoint, self.config, self.dtype = checkpoint, config, np.dtype(dtype)

    def logits(self, tokens: NDArray[np.integer[Any]]) -> Array:
        """Logits (n, vocabulary) of tokens (n,) that stand at positions 0 to n − 1."""
        config = self.config.for_length(len(tokens))
        x = self.embed(tokens)
        extra = self.per_layer(tokens, x)
        shared: dict[int, tuple[Array, Array]] = {}
        for index, block in enumerate(config.blocks):
            parts = read_block(self.checkpoint, config, index, self.dtype)
            x = run_block(block, parts, x, index, shared, None if extra is None else extra[:, index])
        return self.head(x)

    def embed(self, tokens: NDArray[np.integer[Any]]) -> Array:
        return self._matrix(self.config.embedding)[tokens] * self.dtype.type(self.config.embedding_scale)

    def per_layer(self, tokens: NDArray[np.integer[Any]], x: Array) -> Array | None:
        """`config.PerLayerEmbedding` of tokens whose embeddings are x: (n, layers, inner)."""
        extra = self.config.per_layer
        if extra is None:
            return None
        shape = (len(tokens), self.config.layers, extra.inner)
        own = (self._matrix(self.config.stem + extra.table)[tokens] * self.dtype.type(extra.scale)).reshape(shape)
        projected = x @ self._matrix(self.config.stem + extra.projection).T / math.sqrt(self.config.hidden)
        weights = read_norm(self.checkpoint, self.config.stem, extra.norm)
        both = own + normed(projected.astype(self.dtype).reshape(shape), extra.norm, *weights)
        return (both / math.sqrt(2)).astype(self.dtype)

    def head(self, x: Array) -> Array:
        """Logits (n, vocabulary) of what the last block made."""
        config = self.config
        weights = read_norm(self.checkpoint, config.stem, config.final_norm)
        logits = normed(x, config.final_norm, *weights).astype(self.dtype) @ self._matrix(config.head).T
        return softcap(logits * self.dtype.type(config.logit_scale), config.logit_softcap)

    def _matrix(self, module: str) -> Array:
        return dense(self.checkpoint.weight(module), self.dtype)


def dense(weight: Weight | Mxfp4Tensor, dtype: np.dtype[Any]) -> Array:
    return (weight if isinstance(weight, np.ndarray) else weight.decode()).astype(dtype)


def read_block(checkpoint: Checkpoint, config: ModelConfig, index: int, dtype: Any = np.float32) -> Parts:
    """A block's weights as plain numbers; experts are read when they are needed."""
    block, prefix = config.blocks[index], f"{config.block(index)}."
    linears: dict[str, Linear] = {linear.role: linear for linear in block.linears}
    read: dict[str, tuple[Array, Array | None]] = {}
    dtype = np.dtype(dtype)

    def linear(role: str, x: Array) -> Array:
        if role not in read:
            weight = read_weight(checkpoint, prefix, linears[role])
            read[role] = dense(weight, dtype), read_bias(checkpoint, prefix, linears[role])
        weight, bias = read[role]
        return x @ weight.T if bias is None else x @ weight.T + bias.astype(dtype)

    return Parts(
        linear,
        {place: read_norm(checkpoint, prefix, norm) for place, norm in block.norms.items()},
        {
            place: read_vector(checkpoint, prefix + vector.name, vector.shape).astype(dtype)
            for place, vector in block.vectors.items()
        },
    )


def run_block(
    block: Block,
    parts: Parts,
    x: Array,
    index: int,
    shared: dict[int, tuple[Array, Array]],
    extra: Array | None = None,
) -> Array:
    """The stream (n, hidden) of one sequence after a block.

    shared: keys and values of the blocks before, by number; the block adds its own.  extra: (n, inner), this block's
    part of `Reference.per_layer`.
    """

    def norm(place: str, y: Array) -> Array:
        return parts.norm(place, block.norms, y)

    def work(y: Array) -> Array:
        made = gated(parts, block.mlp, norm("mlp_in", y)) if isinstance(block.mlp, Mlp) else mixture(block, parts, y)
        return x.dtype.type(block.residual_scale) * norm("mlp_out", made)

    mixed = norm("attention_out", mix(block, parts, norm("attention_in", x), index, shared))
    mixed = x.dtype.type(block.residual_scale) * mixed
    if block.parallel:
        x = x + mixed + work(x)
    else:
        x = x + mixed
        x = x + work(x)
    if extra is not None:
        gate = activate("gelu_tanh", parts.linear("per_layer.down", x)) * extra
        x = x + norm("per_layer", parts.linear("per_layer.up", gate))
    return x * parts.vectors["layer_scale"] if "layer_scale" in parts.vectors else x
