"""Observers against numpy's own order statistics and an exhaustive search."""

from __future__ import annotations

import numpy as np
import pytest

from penjing.errors import BadInput
from penjing.formats.affine import Grid
from penjing.methods.histogram import BINS, Histogram
from penjing.methods.observers import observer


def error(values: np.ndarray, low: float, high: float, grid: Grid) -> float:
    """Mean squared error of one row on the range [low, high], written out number by number."""
    low, high = min(low, 0.0), max(high, 0.0)
    if grid.symmetric:
        step, zero = max(-low, high) / ((grid.qmax - grid.qmin) / 2), 0
    else:
        step = (high - low) / (grid.qmax - grid.qmin)
        zero = round(grid.qmin - low / step)
    codes = [min(max(round(float(v) / step + zero), grid.qmin), grid.qmax) for v in values]
    return float(np.mean([((c - zero) * step - float(v)) ** 2 for c, v in zip(codes, values, strict=True)]))


def test_minmax_and_percentile() -> None:
    values = np.random.default_rng(0).normal(size=(3, 20001)).astype(np.float32)
    low, high = observer("minmax")(values, Grid())
    assert np.array_equal(low[:, 0], np.sort(values)[:, 0])
    assert np.array_equal(high[:, 0], np.sort(values)[:, -1])
    low, high = observer("percentile")(values, Grid())
    assert np.array_equal(low[:, 0], np.sort(values)[:, 2])  # 0.01 % of 20000 steps
    assert np.array_equal(high[:, 0], np.sort(values)[:, -3])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_mse_is_the_best_of_all_shrunk_ranges(bits: int, symmetric: bool) -> None:
    rng = np.random.default_rng(bits)
    values = rng.standard_t(3, size=(2, 150)).astype(np.float32) + np.float32(0.3)
    grid = Grid(bits, -1, symmetric)
    low, high = observer("mse")(values, grid)
    for row in range(2):
        smallest, largest = values[row].min(), values[row].max()
        tried = [error(values[row], smallest * step / 100, largest * step / 100, grid) for step in range(1, 101)]
        assert error(values[row], low[row, 0], high[row, 0], grid) == pytest.approx(min(tried), rel=1e-3)


def test_an_outlier_is_clipped_by_mse_only_when_that_pays() -> None:
    values = np.concatenate([np.linspace(-1, 1, 4000), [20.0]]).astype(np.float32)[None]
    assert observer("mse")(values, Grid(3, -1, False))[1] < 20
    even = np.arange(-128, 128, dtype=np.float32)[None] / 100
    assert observer("mse")(even, Grid(8, -1, False))[1] == even.max()


def test_an_unknown_observer_is_named_with_the_nearest() -> None:
    with pytest.raises(BadInput, match="did you mean 'minmax'"):
        observer("min-max")


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_histogram_finds_what_mse_finds(symmetric: bool) -> None:
    values = np.random.default_rng(1).standard_t(3, (2, 50_000)).astype(np.float32) + np.float32(0.5)
    grid = Grid(4, -1, symmetric)
    for row, (low, high) in enumerate(zip(*observer("histogram")(values, grid), strict=True)):
        wide = [float(end[row, 0]) for end in observer("mse")(values, grid)]
        assert error(values[row], low[0], high[0], grid) <= error(values[row], *wide, grid) * 1.02


def test_histograms_of_any_batches_are_the_same() -> None:
    values = np.random.default_rng(2).standard_normal(3000).astype(np.float32) * np.geomspace(1e-3, 50, 3000).astype(
        "f"
    )
    whole, parts, other = Histogram(), Histogram(), Histogram()
    whole.add(values)
    for low in range(0, 2000, 77):
        parts.add(values[low : min(low + 77, 2000)])
    other.add(values[2000:])
    parts.merge(other)
    parts.merge(Histogram())
    np.testing.assert_array_equal(parts.counts, whole.counts)
    assert (parts.low, parts.high, parts.reach) == (values.min(), values.max(), whole.reach)
    expected = np.histogram(values.astype(np.float64), BINS, (-whole.reach, whole.reach))[0]
    np.testing.assert_array_equal(whole.counts, expected)


def test_histograms_refuse_what_they_cannot_show() -> None:
    with pytest.raises(BadInput, match="no values were seen"):
        Histogram().range(Grid(8))
    with pytest.raises(BadInput, match="NaN or an infinity"):
        Histogram().add(np.array([1, np.nan], np.float32))
    zeros = Histogram()
    zeros.add(np.zeros(5, np.float32))
    assert zeros.range(Grid(8)) == (0, 0)
