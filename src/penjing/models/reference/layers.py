"""The parts that all blocks share: norms, the MLP and its activations."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from ..config import Activation, Mlp, Norm

# An ndarray of float32 or float64, as the model was asked for: numpy's types do not follow one through arithmetic.
Array: TypeAlias = Any


@dataclass(frozen=True)
class Parts:
    """A block's weights at work.  linear: role, x (n, in) → (n, out).  norms: by place, weight and bias."""

    linear: Callable[[str, Array], Array]
    norms: Mapping[str, tuple[Array, Array | None]]
    vectors: Mapping[str, Array]

    def norm(self, place: str, norms: Mapping[str, Norm], x: Array) -> Array:
        """The norm of this place over the last axis; x itself where there is none."""
        return normed(x, norms[place], *self.norms[place]) if place in norms else x


def normed(x: Array, norm: Norm, weight: Array, bias: Array | None) -> Array:
    """`config.Norm` over the last axis; weight and bias as `read_norm` gives them."""
    if norm.kind == "layer":
        x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + x.dtype.type(norm.eps)) * weight
    return x if bias is None else x + bias


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def softmax(x: Array) -> Array:
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def activate(kind: Activation, x: Array) -> Array:
    """The function between an MLP's matrices (Hendrycks and Gimpel, arXiv 1606.08415; Elfwing et al., 1702.03118)."""
    if kind == "silu":
        return x * sigmoid(x)
    if kind == "gelu":
        erf = np.vectorize(math.erf, otypes=[x.dtype])
        return x / 2 * (1 + erf(x / math.sqrt(2)))
    return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def gated(parts: Parts, mlp: Mlp, x: Array, role: str = "") -> Array:
    """An MLP; ``role`` goes before the names of its weights."""
    up = parts.linear(f"{role}up", x)
    if not mlp.gated:
        return parts.linear(f"{role}down", activate(mlp.activation, up))
    return parts.linear(f"{role}down", activate(mlp.activation, parts.linear(f"{role}gate", x)) * up)


def softcap(x: Array, cap: float) -> Array:
    return x if not cap else cap * np.tanh(x / cap)
