"""The greatest product by a copy in 8 bits: always the row that all products in floats give, to the bit."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from penjing import kernels
from penjing.errors import BadInput
from penjing.kernels import Matrix, Screen, matrix_from, reference, screen_bytes, screen_of, screen_shape

TYPES = (np.float32, np.float16, ml_dtypes.bfloat16)
SHAPES = ((1, 1), (7, 5), (16, 128), (33, 130), (100, 64), (257, 200), (1030, 384))


def pair(weight: NDArray) -> tuple[Matrix, Screen]:
    matrix = matrix_from(weight, sparse=False)
    return matrix, screen_of(matrix)


def first_of_greatest(matrix: Matrix, x: NDArray, scale: float = 1) -> list[int]:
    return (matrix(x) * np.float32(scale)).argmax(axis=1).tolist()


def check(weight: NDArray, x: NDArray) -> int:
    """→ how many panels were left."""
    matrix, screen = pair(weight)
    found = screen.greatest(matrix, x)
    assert found is not None
    tokens, panels = found
    assert tokens.tolist() == first_of_greatest(matrix, x)
    assert 1 <= panels <= -(-matrix.rows // 16)
    return panels


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_same_row_as_by_all_products(shape: tuple[int, int], dtype: type) -> None:
    rng = np.random.default_rng(shape)
    for m in range(1, 9):
        check(rng.normal(0, 1, shape).astype(dtype), rng.normal(0, 1, (m, shape[1])).astype(np.float32))


def test_few_panels_are_left() -> None:
    rng = np.random.default_rng(0)
    weight = rng.normal(0, 1, (20000, 256)).astype(ml_dtypes.bfloat16)
    assert check(weight, rng.normal(0, 1, (1, 256)).astype(np.float32)) < 20000 // 16 // 20


def test_the_copy_alone_would_be_wrong() -> None:
    """Two rows are much alike, and x lies along what rounding to bytes has taken from one more than from the other."""
    rng = np.random.default_rng(1)
    wrong = 0
    for _ in range(100):
        weight = rng.normal(0, 1, (64, 128)).astype(np.float32)
        weight[40] = weight[20] + 0.003 * rng.normal(0, 1, 128)
        matrix, screen = pair(weight)
        lost = weight - screen.decode()
        x = (lost[40] - lost[20] + 0.01 * weight[40])[None]
        wrong += int((screen.decode() @ x[0]).argmax() != matrix(x)[0].argmax())
        check(weight, x)
    assert wrong > 20


def test_of_equals_the_first() -> None:
    rng = np.random.default_rng(2)
    weight = rng.normal(0, 1, (500, 96)).astype(ml_dtypes.bfloat16)
    x = rng.normal(0, 1, (3, 96)).astype(np.float32)
    best = matrix_from(weight)(x).argmax(axis=1)
    for row in (3, 77, 490):
        weight[row] = weight[best[0]]
    check(weight, x)
    check(np.repeat(weight[:1], 500, axis=0), x)
    check(np.zeros_like(weight), x)
    check(weight, np.zeros_like(x))
    weight[:, :] = np.abs(weight)
    check(weight, -np.abs(x))


def test_rows_that_differ_in_a_last_bit() -> None:
    rng = np.random.default_rng(3)
    weight = np.repeat(rng.normal(0, 1, (1, 256)).astype(ml_dtypes.bfloat16), 300, axis=0)
    bits = weight.view(np.uint16)
    bits[np.arange(300), rng.integers(0, 256, 300)] ^= 1
    for m in (1, 2, 5):
        check(weight, rng.normal(0, 1, (m, 256)).astype(np.float32))


@pytest.mark.parametrize("m", [1, 3])
def test_ranges(m: int) -> None:
    """Columns, rows and activations of very different sizes, and numbers that underflow."""
    rng = np.random.default_rng(4)
    shape = (400, 300)
    plain, x = rng.normal(0, 1, shape), rng.normal(0, 1, (m, shape[1]))
    for low, high in ((-3, 3), (-12, 6), (-38, -30), (-45, -38)):
        rows, columns = 10 ** rng.uniform(low, high, (shape[0], 1)), 10 ** rng.uniform(low, high, shape[1])
        for weight in (plain * rows, plain * columns, plain * 10.0**low):
            for size in (1.0, 10 ** rng.uniform(-4, 4, shape[1]), 1e-42):
                check(weight.astype(np.float32), (x * size).astype(np.float32))


def test_what_may_not_be_finite_is_left_to_all_products() -> None:
    rng = np.random.default_rng(5)
    weight, x = (rng.normal(0, 1, shape).astype(np.float32) for shape in ((50, 40), (2, 40)))
    for value in (np.nan, np.inf, -np.inf, 3e38):
        for at in ((0, 0), (49, 39)):
            wrong = weight.copy()
            wrong[at] = value
            matrix, screen = pair(wrong)
            assert screen.greatest(matrix, x) is None
        wrong = x.copy()
        wrong[1, 7] = value
        matrix, screen = pair(weight)
        assert screen.greatest(matrix, wrong) is None


def test_a_scale_may_make_products_equal() -> None:
    rng = np.random.default_rng(6)
    weight = (1.97 + rng.integers(0, 4, (2000, 1)) * 2.0**-23).astype(np.float32)
    x = np.ones((1, 1), np.float32)
    matrix, screen = pair(weight)
    seen = set()
    for scale in (1.0, *np.linspace(0.51, 0.53, 20), 2**-20, 7.1):
        found = screen.greatest(matrix, x, scale)
        assert found is not None
        assert found[0].tolist() == first_of_greatest(matrix, x, scale)
        seen.add(int(found[0][0]))
    assert len(seen) > 1  # equal to other rows after some of the scales


@pytest.mark.parametrize("shape", SHAPES)
def test_the_copy_and_its_size(shape: tuple[int, int]) -> None:
    weight = np.random.default_rng(7).normal(0, 1, shape).astype(np.float32)
    screen = pair(weight)[1]
    assert (screen.rows, screen.columns) == screen_shape(*shape)
    np.testing.assert_array_equal(screen.decode()[:, : shape[1]], reference.screen(weight))
    assert not screen.decode()[:, shape[1] :].any()
    assert 0.9 * screen_bytes(*shape) - 256 < screen.nbytes <= screen_bytes(*shape) + 64 * -(-shape[0] // 16)


def test_threads_change_nothing() -> None:
    rng = np.random.default_rng(8)
    weight, x = rng.normal(0, 1, (3000, 64)).astype(np.float16), rng.normal(0, 1, (4, 64)).astype(np.float32)
    before = kernels.threads()
    found = []
    for threads in (1, 3):
        kernels.set_threads(threads)
        found.append(check(weight, x))
    kernels.set_threads(before)
    assert found[0] == found[1]


def test_what_has_no_screen_is_refused() -> None:
    rng = np.random.default_rng(9)
    weight = rng.normal(0, 1, (40, 64)).astype(np.float32)
    codes = matrix_from(kernels.quantize(weight, reference.Grid(4, 32)))
    with pytest.raises(BadInput, match="a screen of int4: only matrices of floats have one"):
        screen_of(codes)
    matrix, screen = pair(weight)
    with pytest.raises(ValueError, match="the screen is another's"):
        screen.greatest(codes, np.zeros((1, 64), np.float32))
    with pytest.raises(ValueError, match="the screen is another's"):
        screen.greatest(pair(weight[:30])[0], np.zeros((1, 64), np.float32))
    for m in (0, 9):
        with pytest.raises(ValueError, match="x: give 1 to 8 rows"):
            screen.greatest(matrix, np.zeros((m, 64), np.float32))
