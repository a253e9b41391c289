"""Products of pairs of bfloat16: exact, so that they are the reference's to the rounding of float32 sums."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from penjing import kernels
from penjing.kernels import reference

pytestmark = pytest.mark.skipif(not kernels.has_pairs(), reason="this machine does not multiply pairs of bfloat16")
BF16 = ml_dtypes.bfloat16


@pytest.mark.parametrize(
    ("rows", "columns"), [(1, 1), (0, 5), (2, 48), (7, 49), (31, 96), (513, 130), (2049, 64), (4097, 17)]
)
def test_gram_is_the_reference(rows: int, columns: int) -> None:
    rng = np.random.default_rng((rows, columns))
    x = (rng.standard_normal((rows, columns)) * np.exp(rng.standard_normal(columns))).astype(BF16)
    before = rng.standard_normal((columns, columns)).astype(np.float32)
    ours, twin = before.copy(), before.astype(np.float64)
    kernels.add_gram(x, ours)
    reference.add_gram(x, twin)
    size = np.abs(x.astype(np.float64)).T @ np.abs(x.astype(np.float64)) + np.abs(before)
    assert (np.abs(ours - twin) <= 4 * np.sqrt(rows + 1) * 2.0**-24 * size)[np.triu_indices(columns)].all()


@pytest.mark.parametrize(
    ("depth", "a", "low", "high", "b"),
    [(1, 1, 0, 1, 1), (0, 4, 1, 3, 5), (5, 50, 49, 50, 47), (33, 130, 7, 129, 49), (2050, 60, 3, 60, 17)],
)
def test_product_is_the_reference(depth: int, a: int, low: int, high: int, b: int) -> None:
    rng = np.random.default_rng((depth, a, b))
    one, other = (rng.standard_normal((depth, n)).astype(np.float32) for n in (a, b))
    ours, twin = (kernels.PairMatrix(other).product(one, low, high), reference.pair_product(one, low, high, other))
    assert ours.shape == twin.shape == (high - low, b)
    size = np.abs(one[:, low:high]).T.astype(np.float64) @ np.abs(other)
    assert (np.abs(ours - twin) <= 4 * np.sqrt(depth + 1) * 2.0**-24 * size).all()


@pytest.mark.parametrize(("rows", "low", "high"), [(7, 2, 5), (130, 0, 128), (131, 128, 131), (3000, 2047, 2049)])
def test_blocks_of_rows_change(rows: int, low: int, high: int) -> None:
    rng = np.random.default_rng((rows, low))
    a, values = (rng.standard_normal((rows, 50)).astype(np.float32) for _ in range(2))
    held = kernels.PairMatrix(values)
    values[low:high] += 1
    held.put(values, low, high)
    np.testing.assert_array_equal(held.product(a, 3, 50), kernels.PairMatrix(values).product(a, 3, 50))


@pytest.mark.parametrize(("rows", "first"), [(8, 0), (8, 5), (300, 129), (2500, 2051)])
def test_first_rows_alone(rows: int, first: int) -> None:
    rng = np.random.default_rng((rows, first))
    a, values = (rng.standard_normal((rows, 50)).astype(np.float32) for _ in range(2))
    found = kernels.PairMatrix(values).product(a[:first], 1, 40)
    np.testing.assert_array_equal(found, kernels.PairMatrix(values[:first]).product(a[:first], 1, 40))


def test_the_number_of_threads_changes_no_bit() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((300, 200)).astype(np.float32)
    before, found = kernels.threads(), []
    try:
        for threads in (1, 2, 3):
            kernels.set_threads(threads)
            gram = np.zeros((200, 200), np.float32)
            kernels.add_gram(x.astype(BF16), gram)
            found.append((np.triu(gram), kernels.PairMatrix(x).product(x, 0, 200)))
    finally:
        kernels.set_threads(before)
    for gram, product in found[1:]:
        np.testing.assert_array_equal(gram, found[0][0])
        np.testing.assert_array_equal(product, found[0][1])


def test_wrong_shapes_are_refused() -> None:
    x = np.ones((3, 4), np.float32)
    with pytest.raises(ValueError, match="total"):
        kernels.add_gram(x.astype(BF16), np.zeros((4, 5), np.float32))
    with pytest.raises(ValueError, match="columns"):
        kernels.PairMatrix(x).product(x, 2, 5)
    with pytest.raises(ValueError, match="columns"):
        kernels.PairMatrix(x).product(x, 3, 2)
    with pytest.raises(ValueError, match="more rows"):
        kernels.PairMatrix(x[:2]).product(x, 0, 4)
    with pytest.raises(ValueError, match="values: give"):
        kernels.PairMatrix(x).put(x[:2], 0, 2)
    with pytest.raises(ValueError, match="rows of values"):
        kernels.PairMatrix(x).put(x, 2, 4)
