"""Norms, rotary positions, activations, routing and the delta rule against torch and plain numpy, in float64."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from penjing import kernels

RNG = np.random.default_rng(5)
SIZES = [1, 3, 15, 16, 17, 64, 100, 1000]  # tails of vectors, and several sums


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape, np.float32)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norms(kind: Any, size: int) -> None:
    x, weight, bias = 3 * normal(5, size) + 1, normal(size), normal(size)
    wide = x.astype(np.float64)
    if kind == "layer":
        wide = wide - wide.mean(axis=1, keepdims=True)
    right = wide / np.sqrt(np.square(wide).mean(axis=1, keepdims=True) + 1e-3)
    plain = kernels.norm(x, None, eps=1e-3, kind=kind)
    np.testing.assert_allclose(plain, right, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(kernels.norm(x, weight, eps=1e-3, kind=kind), right * weight, atol=1e-5, rtol=1e-5)
    if kind == "layer":
        both = kernels.norm(x, weight, bias, eps=1e-3, kind=kind)
        np.testing.assert_allclose(both, right * weight + bias, atol=1e-5, rtol=1e-5)
    for row in range(5):  # a row depends on nothing else
        np.testing.assert_array_equal(kernels.norm(x[row : row + 1], None, eps=1e-3, kind=kind)[0], plain[row])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("size", "pairs"), [(2, 1), (6, 2), (64, 32), (64, 16), (80, 20), (34, 17)])
def test_rotation(size: int, pairs: int, interleaved: bool) -> None:
    """As complex numbers; what is not among the pairs stays."""
    x, angles = normal(3, 4, size), 10 * normal(3, pairs)
    got = kernels.rotate(x, np.cos(angles), np.sin(angles), interleaved=interleaved)
    first, second = (
        (x[..., : 2 * pairs : 2], x[..., 1 : 2 * pairs : 2])
        if interleaved
        else (x[..., :pairs], x[..., pairs : 2 * pairs])
    )
    turned = (first + 1j * second.astype(np.complex128)) * np.exp(1j * angles.astype(np.float64))[:, None]
    right = x.copy()
    if interleaved:
        right[..., : 2 * pairs : 2], right[..., 1 : 2 * pairs : 2] = turned.real, turned.imag
    else:
        right[..., :pairs], right[..., pairs : 2 * pairs] = turned.real, turned.imag
    np.testing.assert_allclose(got, right, atol=2e-6)
    np.testing.assert_array_equal(got[..., 2 * pairs :], x[..., 2 * pairs :])


def exact(kind: str, x: np.ndarray) -> np.ndarray:
    if kind == "silu":
        return x / (1 + np.exp(-x))
    if kind == "gelu":
        return x * np.vectorize(lambda v: math.erfc(-v / math.sqrt(2)) / 2)(x)
    return x / (1 + np.exp(-2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh"])
def test_activations(kind: str) -> None:
    gate = np.concatenate([np.linspace(-12, 12, 2003), [0, -0.0, 1e-30, 50, 1e4]]).astype(np.float32)[None]
    up = normal(*gate.shape)
    right = exact(kind, gate.astype(np.float64))
    np.testing.assert_allclose(kernels.activate(kind, gate), right, rtol=2e-5, atol=1e-12)
    np.testing.assert_allclose(kernels.activate(kind, gate, up), right * up, rtol=2e-5, atol=1e-12)
    low = kernels.activate(kind, np.array([[-1e4, -100, np.nan]], np.float32))
    np.testing.assert_allclose(low[0, :2], 0, atol=1e-6)
    assert np.isnan(low[0, 2])


def test_activations_equal_torch() -> None:
    functional = pytest.importorskip("torch").nn.functional
    import torch

    x = torch.linspace(-9, 9, 501)[None]
    for kind, right in (
        ("silu", functional.silu(x)),
        ("gelu", functional.gelu(x)),
        ("gelu_tanh", functional.gelu(x, approximate="tanh")),
    ):
        np.testing.assert_allclose(kernels.activate(kind, x.numpy()), right.numpy(), atol=2e-6)


def test_the_clamped_activation() -> None:
    gate, up = 9 * normal(3, 50), 9 * normal(3, 50)
    g, u = np.minimum(gate.astype(np.float64), 7), np.clip(up.astype(np.float64), -7, 7)
    right = (u + 1) * g / (1 + np.exp(-1.702 * g))
    np.testing.assert_allclose(kernels.activate("clamped", gate, up, limit=7, alpha=1.702), right, rtol=1e-5, atol=1e-6)


def experts(**changes: Any) -> SimpleNamespace:
    usual = {"count": 12, "top_k": 3, "scoring": "softmax", "normalized": True, "scale": 1.0}
    return SimpleNamespace(**usual | {"groups": 1, "top_groups": 1, "group_score": "max"} | changes)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "chosen"])
@pytest.mark.parametrize("groups", [None, (4, 2, "pair"), (3, 1, "max")])
def test_routing(scoring: str, groups: Any) -> None:
    """By hand: scores, what may be chosen, the best of it, their weights."""
    logits, correction, each = 2 * normal(40, 12), normal(12), np.exp(normal(12))
    total, top, worth = groups or (1, 1, "max")
    rule = experts(scoring=scoring, scale=2.5, groups=total, top_groups=top, group_score=worth)
    chosen, weights = kernels.route(logits, rule, correction, each)
    for row in range(40):
        wide = logits[row].astype(np.float64)
        scores = {"softmax": np.exp(wide) / np.exp(wide).sum(), "sigmoid": 1 / (1 + np.exp(-wide)), "chosen": wide}[
            scoring
        ]
        wanted = scores + correction
        parts = np.sort(wanted.reshape(total, -1), axis=1)
        value = parts[:, -1] + (parts[:, -2] if worth == "pair" else 0)
        allowed = np.repeat(np.isin(np.arange(total), np.argsort(-value)[:top]), 12 // total)
        right = [int(i) for i in np.argsort(-wanted) if allowed[i]][:3]
        assert chosen[row].tolist() == right
        of = scores[right]
        shares = np.exp(of) / np.exp(of).sum() if scoring == "chosen" else of / of.sum()
        np.testing.assert_allclose(weights[row], shares * 2.5 * each[right], rtol=1e-5)


def test_routing_among_equals_and_what_is_no_number() -> None:
    chosen, weights = kernels.route(np.zeros((1, 12), np.float32), experts(normalized=False))
    assert chosen.tolist() == [[0, 1, 2]]
    np.testing.assert_allclose(weights, 1 / 12, rtol=1e-6)
    chosen, weights = kernels.route(np.full((1, 12), np.nan, np.float32), experts(groups=4, top_groups=2))
    assert len(set(chosen[0].tolist())) == 3
    assert np.isnan(weights).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 13}, "more than there are to choose from"),
        ({"groups": 5}, "groups"),
        ({"groups": 4, "top_groups": 5}, "groups"),
        ({"groups": 12, "top_groups": 2}, "more than there are to choose from"),
        ({"scoring": "tanh"}, "softmax, sigmoid or chosen"),
        ({"count": 2000}, "1 to 1024 experts"),
    ],
)
def test_rules_that_cannot_be(changes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kernels.route(np.zeros((1, 12), np.float32), experts(**changes))


@pytest.mark.parametrize(("keys", "values"), [(1, 1), (8, 6), (16, 16), (7, 17), (128, 128), (32, 83)])
def test_the_delta_rule(keys: int, values: int) -> None:
    state, right = normal(keys, values), np.zeros(0)
    wide = state.astype(np.float64)
    for _ in range(3):
        query, key, value = normal(keys), normal(keys) / np.float32(keys**0.5), normal(values)
        got = kernels.delta(state, query, key, value, 0.7, 0.4)
        wide = 0.7 * wide
        wide = wide + np.outer(key, 0.4 * (value - key @ wide))
        right = query @ wide
        np.testing.assert_allclose(got, right, atol=2e-4, rtol=1e-4)
    np.testing.assert_allclose(state, wide, atol=2e-5, rtol=1e-5)


def test_shapes_that_do_not_fit() -> None:
    x = normal(2, 8)
    with pytest.raises(ValueError, match=r"weight: give a contiguous float32 array \(8\)"):
        kernels.norm(x, normal(7), eps=1e-5)
    with pytest.raises(ValueError, match="without bias"):
        kernels.norm(x, None, normal(8), eps=1e-5)
    with pytest.raises(ValueError, match="more pairs than a head has"):
        kernels.rotate(normal(1, 2, 6), normal(1, 4), normal(1, 4))
    with pytest.raises(ValueError, match="known: silu"):
        kernels.activate("relu7", x)
    with pytest.raises(ValueError, match='"clamped" needs it'):
        kernels.activate("clamped", x)
