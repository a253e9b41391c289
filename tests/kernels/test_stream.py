"""The compressor's primitives, bit for bit as the formats in numpy."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from penjing import kernels
from penjing.errors import BadInput, Unsupported
from penjing.formats import packed
from penjing.formats.affine import Grid
from penjing.kernels import reference

DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16]
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda t: np.dtype(t).name)
by_shape = pytest.mark.parametrize("shape", [(1, 1), (7, 96), (70, 1120)], ids=str)


def random(shape: tuple[int, int], dtype: type) -> np.ndarray:
    return np.random.default_rng(shape).standard_normal(shape).astype(dtype)


@by_dtype
@by_shape
@pytest.mark.parametrize("bits", range(2, 9))
def test_quantize(shape: tuple[int, int], dtype: type, bits: int) -> None:
    weight = random(shape, dtype)
    mask = np.random.default_rng(1).random(shape) < 0.6
    for group in (-1, 0, shape[1], *([] if shape[1] % 8 else [8, 32])):
        for symmetric, scale_dtype in ((True, "float32"), (False, "bfloat16"), (True, "float16"), (False, "float32")):
            grid = Grid(bits, group, symmetric, scale_dtype)
            for kept in (None, mask):
                ours, twin = kernels.quantize(weight, grid, kept), reference.quantize(weight, grid, kept)
                assert ours.scale.shape == twin.scale.shape
                assert (ours.scale == twin.scale).all()
                assert (ours.codes == twin.codes).all()
                assert (ours.zero_point is None) == symmetric
                assert symmetric or (ours.zero_point == twin.zero_point).all()
                words, scale, zero_point = kernels.quantize_packed(weight, grid, kept)
                assert (words == packed.pack(twin.codes, bits)).all()
                assert (scale == twin.scale).all()
                assert symmetric or (zero_point == twin.zero_point).all()


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_steps_round_as_numpy_rounds(name: str) -> None:
    """Steps of every size that half precision has, subnormal and overflowing ones too."""
    reach = np.exp2(np.random.default_rng(0).uniform(-30, 22, 4000)).astype(np.float32)
    reach[:5] = 0, 6e-8, 65519 * 7.5, 2.0**-14 * 7.5, 2.0**-24 * 7.5
    weight, grid = reach[:, None], Grid(4, -1, True, name)
    with np.errstate(over="ignore"):
        twin = reference.quantize(weight, grid)
    assert (kernels.quantize(weight, grid).scale == twin.scale).all()


def test_a_tie_goes_to_the_even_code() -> None:
    weight = np.array([[127.5, 0.5, 1.5, 2.5, -0.5, -1.5]], np.float32)  # s = 1
    assert kernels.quantize(weight, Grid(8)).codes.tolist() == [[127, 0, 2, 2, 0, -2]]


@by_dtype
@by_shape
@pytest.mark.parametrize("sparsity", [0, 0.1, 0.5, 0.77, 1])
def test_prune(shape: tuple[int, int], dtype: type, sparsity: float) -> None:
    """Coarse values, so that most decisions are between equal magnitudes."""
    weight = np.round(random(shape, np.float32) * 4).astype(dtype)
    for values in (weight, random(shape, dtype)):
        for scope in ("row", "tensor"):
            ours = kernels.prune(values, sparsity, scope)
            assert ours.dtype == values.dtype
            assert (ours.view(np.uint8) == reference.prune(values, sparsity, scope).view(np.uint8)).all()
        assert kernels.prune_threshold(values, sparsity) == reference.prune_threshold(values, sparsity)


def test_prune_counts_exactly_and_keeps_the_largest() -> None:
    weight = random((40, 50), np.float32)
    ours = kernels.prune(weight, 0.3)
    assert np.count_nonzero(ours == 0) == 600
    assert np.abs(weight[ours == 0]).max() <= np.abs(ours[ours != 0]).min()
    assert (np.count_nonzero(kernels.prune(weight, 0.3, "row") == 0, axis=1) == 15).all()


@by_dtype
@pytest.mark.parametrize("pattern", [(2, 4), (4, 8), (1, 32), (0, 2)])
def test_prune_by_pattern(dtype: type, pattern: tuple[int, int]) -> None:
    weight = np.round(random((6, 64), np.float32) * 3).astype(dtype)
    ours = kernels.prune(weight, 0.5, pattern=pattern)
    assert (ours.view(np.uint8) == reference.prune(weight, 0.5, pattern=pattern).view(np.uint8)).all()
    assert (np.count_nonzero(ours.astype(np.float32).reshape(-1, pattern[1]), axis=1) <= pattern[0]).all()


@by_dtype
def test_has_nonfinite(dtype: type) -> None:
    large = np.zeros((3, 300_001), dtype)
    large[:] = np.finfo(np.float16).max
    assert not kernels.has_nonfinite(large)
    assert not kernels.has_nonfinite(np.zeros((0, 4), dtype))
    for place in ((0, 0), (1, 123_456), (2, 300_000)):
        for value in (np.nan, np.inf, -np.inf):
            before = large[place]
            large[place] = value
            assert kernels.has_nonfinite(large)
            large[place] = before


def test_wrong_input_is_refused() -> None:
    weight = random((4, 6), np.float32)
    with pytest.raises(BadInput, match="does not divide 6"):
        kernels.quantize(weight, Grid(4, 4))
    with pytest.raises(BadInput, match="matrix"):
        kernels.quantize(weight[0], Grid(4))
    with pytest.raises(Unsupported, match="int8"):
        kernels.quantize(weight.astype(np.int8), Grid(4))
    with pytest.raises(ValueError, match="mask"):
        kernels.quantize(weight, Grid(4), np.ones((4, 5), bool))
    with pytest.raises(BadInput, match="share from 0 to 1"):
        kernels.prune(weight, 1.5)
    with pytest.raises(BadInput, match="4:2"):
        kernels.prune(weight, 0, pattern=(4, 2))
    with pytest.raises(BadInput, match="known: row, tensor"):
        kernels.prune(weight, 0.5, "column")  # type: ignore[arg-type]
    with pytest.raises(Unsupported, match="1, 2 or 4 bytes"):
        kernels.bitmask_encode(np.zeros((2, 2)))
