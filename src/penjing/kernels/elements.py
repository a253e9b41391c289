"""What a decoder does with rows besides multiplying them with weights, one function at a time."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .. import _native

Floats = NDArray[np.float32]


def norm(
    x: Floats, weight: Floats | None, bias: Floats | None = None, *, eps: float, kind: Literal["rms", "layer"] = "rms"
) -> Floats:
    """Rows of x (n, size) by their root mean square (Zhang and Sennrich, arXiv 1910.07467), or less their mean and by
    their deviation (Ba et al., arXiv 1607.06450); times weight, plus bias, each (size,) or None."""
    return _native.norm(x, weight, bias, eps, kind)


def rotate(x: Floats, cosine: Floats, sine: Floats, *, interleaved: bool = False) -> Floats:
    """Heads x (n, heads, head_dim), pairs of whose first elements turn by angles of cosine and sine (n, pairs).

    A pair is elements i and i + pairs, or interleaved 2i and 2i + 1.  Su et al., arXiv 2104.09864.
    """
    return _native.rotate(x, cosine, sine, interleaved)


def activate(kind: str, gate: Floats, up: Floats | None = None, *, limit: float = math.inf, alpha: float = 1) -> Floats:
    """activation(gate) · up, or activation(gate), for matrices of one shape; kind: silu, gelu, gelu_tanh or clamped.

    Of "clamped", see `penjing.models.config.Experts`.
    """
    return _native.activate(kind, gate, up, limit, alpha)


def route(
    logits: Floats, experts: Any, correction: Floats | None = None, expert_scale: Floats | None = None
) -> tuple[NDArray[np.int32], Floats]:
    """Numbers and weights (n, top_k) of the experts that rows go to, best first; ``logits`` (n, count).

    experts: a `penjing.models.config.Experts`.  correction, expert_scale: its vectors, (count,) or None.
    """
    return _native.route(logits, experts, correction, expert_scale)


def delta(state: Floats, query: Floats, key: Floats, value: Floats, decay: float, beta: float) -> Floats:
    """One step of the gated delta rule (Yang et al., arXiv 2412.06464): what is read, (values,).

    state (keys, values) ← decay · state + key ⊗ beta (value − keyᵀ (decay · state)), in place; the result is
    queryᵀ state.  query, key: (keys,).  value: (values,).
    """
    return _native.delta(state, query, key, value, decay, beta)
