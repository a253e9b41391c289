"""Attention and the MLP's gate against plain numpy in float64, on every instruction set that this machine has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest

from penjing import kernels
from penjing.errors import BadInput
from penjing.kernels import reference
from penjing.kernels.decoder import MAX_HEAD_DIM

# (queries, heads, kv_heads, head_dim, length, window): heads of odd sizes, several tiles and row blocks, windows that
# begin within a tile, and one query, as in decoding.
SHAPES = [
    (1, 6, 2, 64, 300, None),
    (1, 4, 2, 8, 1, None),
    (150, 6, 2, 64, 150, None),
    (37, 4, 4, 6, 90, None),
    (64, 4, 1, 10, 64, 5),
    (130, 8, 2, 80, 333, 70),
    (70, 4, 2, 128, 200, 1),
    (3, 3, 3, 256, 500, None),
    (100, 12, 2, 17, 100, 33),
    (5, 20, 1, 16, 130, 64),
]


def inputs() -> Iterator[tuple[tuple, list[np.ndarray]]]:
    rng = np.random.default_rng(11)
    for n, heads, kv_heads, d, length, window in SHAPES:
        queries = 3 * rng.standard_normal((n, heads, d), np.float32)
        # As in a cache: the heads lie further apart than they are long.
        cache = rng.standard_normal((2, kv_heads, length + 7, d), np.float32)
        yield (n, heads, kv_heads, d, length, window), [queries, cache[0, :, :length], cache[1, :, :length]]


def errors() -> dict[str, float]:
    """Largest error of each kernel on this process's instruction set."""
    worst = 0.0
    for shape, arrays in inputs():
        right = reference.attention(*arrays, window=shape[-1])
        worst = max(worst, float(np.abs(kernels.attention(*arrays, window=shape[-1]) - right).max()))
    gate = np.concatenate([np.linspace(-100, 100, 3001), [0, -0.0, 1e-30]]).astype(np.float32).reshape(4, -1)
    up = np.random.default_rng(3).standard_normal(gate.shape, np.float32)
    right = reference.gated(gate, up)
    relative = np.abs(kernels.gated(gate, up) - right) / np.maximum(np.abs(right), 1e-30)
    return {"isa": kernels.isa(), "attention": worst, "gated": float(relative[gate > -85].max())}


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512-vnni"])
def test_kernels_equal_the_reference(isa: str) -> None:
    code = f"import sys, json; sys.path.insert(0, {os.path.dirname(__file__)!r})"
    code += "; import test_decoder; print(json.dumps(test_decoder.errors()))"
    ran = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PENJING_ISA": isa}, capture_output=True, text=True
    )
    if "PENJING_ISA" in ran.stderr:
        pytest.skip(f"this machine has no {isa}")
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert found["isa"] == isa
    assert found["attention"] < 5e-6
    assert found["gated"] < 1e-6


def test_the_reference_equals_torch() -> None:
    torch = pytest.importorskip("torch")
    for (n, heads, kv_heads, _, length, window), arrays in inputs():
        q, k, v = (torch.from_numpy(np.ascontiguousarray(each)).double() for each in arrays)
        k, v = (each.repeat_interleave(heads // kv_heads, 0) for each in (k, v))
        at, key = torch.arange(length - n, length)[:, None], torch.arange(length)
        seen = (key <= at) & (key > at - (window or length))
        right = torch.nn.functional.scaled_dot_product_attention(q.swapaxes(0, 1), k, v, attn_mask=seen).swapaxes(0, 1)
        np.testing.assert_allclose(reference.attention(*arrays, window=window), right.numpy(), atol=1e-6)
    gate = torch.linspace(-30, 30, 101)[None].double()
    right = torch.nn.functional.silu(gate) * 3
    mine = reference.gated(gate.float().numpy(), np.full((1, 101), 3, np.float32))
    np.testing.assert_allclose(mine, right.numpy(), rtol=1e-6)


def test_the_widest_head_is_what_the_kernel_takes() -> None:
    wide = np.ones((1, 1, MAX_HEAD_DIM + 1), np.float32)
    fits = np.ascontiguousarray(wide[..., 1:])  # one position: what lies between positions does not matter
    np.testing.assert_array_equal(kernels.attention(fits, fits, fits), fits)
    with pytest.raises(ValueError, match=f"1 to {MAX_HEAD_DIM}"):
        kernels.attention(wide, wide, wide)


def test_large_scores_do_not_overflow() -> None:
    queries = np.full((2, 1, 16), 1e3, np.float32)
    keys = np.stack([np.full(16, sign, np.float32) for sign in (1, -1, 1)])[None] * 1e3
    values = np.arange(3 * 16, dtype=np.float32).reshape(1, 3, 16)
    mixed = kernels.attention(queries, keys, values)
    np.testing.assert_allclose(mixed[0, 0], values[0, 0], atol=1e-30)  # the second key is hidden by its score
    np.testing.assert_allclose(mixed[1, 0], (values[0, 0] + values[0, 2]) / 2)


def test_numbers_that_are_none_stay_visible() -> None:
    _, (queries, keys, values) = next(iter(inputs()))
    queries[0, 1] = np.nan
    mixed = kernels.attention(queries, keys, values)
    assert np.isnan(mixed[0, 1]).all()
    assert np.isfinite(np.delete(mixed, 1, axis=1)).all()
    gate = np.array([[np.nan, 1.0, np.inf]], np.float32)
    assert np.isnan(kernels.gated(gate, np.ones((1, 3), np.float32))[0]).tolist() == [True, False, False]


@pytest.mark.parametrize(
    ("queries", "keys", "message"),
    [
        ((3, 4, 8), (2, 2, 8), "more of them than positions"),
        ((3, 5, 8), (2, 4, 8), "does not divide"),
        ((1, 2, 300), (2, 4, 300), "head_dim is 1 to 256"),
        ((1, 4, 8), (2, 4, 9), "keys, values"),
    ],
)
def test_shapes_that_do_not_fit(queries: tuple, keys: tuple, message: str) -> None:
    zeros = np.zeros(keys, np.float32)
    with pytest.raises((BadInput, ValueError), match=message):
        kernels.attention(np.zeros(queries, np.float32), zeros, zeros)
