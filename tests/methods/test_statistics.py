"""What is collected, against the same numbers computed at once in float64."""

from __future__ import annotations

import numpy as np
import pytest

from penjing.errors import BadInput
from penjing.methods.statistics import KINDS, Collector, Statistics


@pytest.mark.parametrize("columns", [1, 7, 1500])
def test_batches_and_merges_give_what_all_rows_at_once_do(columns: int) -> None:
    x = np.random.default_rng(columns).standard_normal((90, columns)).astype(np.float32) * 3 + 1
    first, second = Collector(columns, KINDS), Collector(columns, KINDS)
    for start, stop in ((0, 1), (1, 40), (40, 40)):
        first.add(x[start:stop])
    second.add(x[40:])
    first.merge(second)
    found, wide = first.statistics(), x.astype(np.float64)
    assert first.count == 90
    np.testing.assert_allclose(found["hessian"], wide.T @ wide / 90, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found["hessian"], found["hessian"].T)
    np.testing.assert_allclose(found["input_norm"], np.sqrt((wide**2).mean(axis=0)), rtol=1e-6)
    np.testing.assert_allclose(found["mean"], wide.mean(axis=0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["absmean"], np.abs(wide).mean(axis=0), rtol=1e-6)
    np.testing.assert_array_equal(found["absmax"], np.abs(x).max(axis=0))
    assert all(value.dtype == np.float32 for value in found.values())


def test_sums_do_not_forget_small_batches() -> None:
    """A million rows of 1 after one of 1e4: float32 sums of squares would stand still."""
    collector = Collector(1, ("input_norm", "hessian"))
    collector.add(np.full((1, 1), 1e4, np.float32))
    for _ in range(100):
        collector.add(np.ones((1, 1), np.float32))
    found = collector.statistics()
    assert found["hessian"][0, 0] == pytest.approx((1e8 + 100) / 101, rel=1e-7)
    assert found["input_norm"][0] == pytest.approx(((1e8 + 100) / 101) ** 0.5, rel=1e-7)


def test_memory_is_counted() -> None:
    for accumulate in ("float32", "float64"):
        collector = Collector(300, ("hessian", "absmax"), accumulate)  # type: ignore[arg-type]
        assert collector.nbytes == (300 * 300 + 300) * np.dtype(accumulate).itemsize
        assert Collector.bytes_needed(300, ("hessian", "absmax"), accumulate) >= collector.nbytes
    assert Collector(300, ()).nbytes == 0


def test_what_is_wrong_is_named() -> None:
    with pytest.raises(BadInput, match="did you mean 'hessian'"):
        Collector(3, ("hesian",))
    collector = Collector(3, ("mean",))
    with pytest.raises(BadInput, match="saw no rows"):
        collector.statistics()
    with pytest.raises(BadInput, match="3 columns"):
        collector.add(np.zeros((2, 4), np.float32))
    for bad in (np.nan, np.inf):
        with pytest.raises(BadInput, match="NaN or an infinity"):
            collector.add(np.full((2, 3), bad, np.float32))
    with pytest.raises(BadInput, match="cannot be merged"):
        collector.merge(Collector(4, ("mean",)))
    with pytest.raises(BadInput, match="'hessian' is missing: this method needs calibration"):
        Statistics().need("hessian", 3)
    with pytest.raises(BadInput, match=r"shape \(3,\).*4 columns"):
        Statistics({"mean": np.zeros(3)}).need("mean", 4)
    with pytest.raises(BadInput, match="'mean' has a NaN"):
        Statistics({"mean": np.full(3, np.nan)}).need("mean", 3)


def test_what_is_derived_is_made_once_for_the_same_settings() -> None:
    made = []
    shared = Statistics()
    for settings in (1, 1, 2, 2, 1):
        shared.derived("factor", settings, lambda: made.append(0))
    assert len(made) == 3
