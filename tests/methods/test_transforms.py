"""Scales and rotations: nothing changes but what rounding does, and they are what the papers say."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from realistic import layer, statistics

from penjing.errors import BadInput, BadRecipe
from penjing.formats.affine import Grid
from penjing.methods import awq, gptq, linalg, rotation, rtn, scaling, smoothquant
from penjing.methods.statistics import Statistics


def test_folding_changes_nothing() -> None:
    """A norm's gain, or a layer's rows and bias, divided; the readers' columns multiplied."""
    rng = np.random.default_rng(0)
    weight, x, _ = layer(5, 12, 0)
    gain = rng.standard_normal(12).astype(np.float32)
    before = rng.standard_normal((12, 7)).astype(np.float32)
    bias = rng.standard_normal(12).astype(np.float32)
    scale = np.exp(rng.standard_normal(12)).astype(np.float32)
    read = scaling.into_columns(weight, scale)
    np.testing.assert_allclose((x * scaling.out_of_rows(gain, scale)) @ read.T, (x * gain) @ weight.T, rtol=2e-4)
    z = rng.standard_normal((9, 7)).astype(np.float32)
    made = z @ scaling.out_of_rows(before, scale).T + scaling.out_of_rows(bias, scale)
    np.testing.assert_allclose(made @ read.T, (z @ before.T + bias) @ weight.T, rtol=1e-3, atol=1e-3)
    assert scaling.into_columns(weight.astype(ml_dtypes.bfloat16), scale).dtype == ml_dtypes.bfloat16


def test_statistics_of_the_scaled_input_are_those_measured_on_it() -> None:
    _, x, before = layer(1, 10, 1)
    scale = np.exp(np.random.default_rng(2).standard_normal(10)).astype(np.float32)
    after, measured = scaling.scaled(before, scale), statistics(x / scale)
    for name, value in measured.items():
        np.testing.assert_allclose(after[name], value, rtol=1e-4, atol=1e-5 * np.abs(value).max())


@pytest.mark.parametrize("strength", [0.0, 0.5, 0.8, 1.0])
def test_smoothquant_is_its_formula(strength: float) -> None:
    first, x, measured = layer(6, 10, 2)
    second = layer(4, 10, 3)[0]
    scale = smoothquant.solve([first, second], measured, smoothquant.Config(strength))
    largest = np.maximum(np.abs(first).max(axis=0), np.abs(second).max(axis=0))
    np.testing.assert_allclose(scale, np.abs(x).max(axis=0) ** strength / largest ** (1 - strength), rtol=1e-5)
    if strength == 0.5:  # both sides then reach as far
        np.testing.assert_allclose(np.abs(x / scale).max(axis=0), largest * scale, rtol=1e-5)


def test_smoothquant_leaves_what_is_never_seen() -> None:
    weight, _, measured = layer(6, 10, 2, dead=(4,))
    weight[:, 7] = 0
    scale = smoothquant.solve([weight], measured, smoothquant.Config())
    assert scale[4] == scale[7] == 1
    assert np.isfinite(scale).all()


def test_awq_takes_the_best_of_its_tries() -> None:
    """Each α by hand: scale, round, scale back, and the error of the outputs on the inputs themselves."""
    first, x, measured = layer(20, 32, 4)
    second, grid = layer(12, 32, 5)[0], Grid(3, 16)
    scale = awq.solve([first, second], measured, awq.Config(grid))
    wide, errors = x.astype(np.float64), []
    scales = []
    for power in range(20):
        s = np.abs(wide).mean(axis=0) ** (power / 20)
        s /= np.sqrt(s.max() * s.min())
        scales.append(s)
        error = 0.0
        for weight in (first, second):
            rounded = rtn.solve((weight * s).astype(np.float32), measured, rtn.Config(grid)).decode() / s
            error += (((weight - rounded) @ wide.T) ** 2).mean(axis=1).sum()
        errors.append(error)
    assert np.argmin(errors) > 0
    np.testing.assert_allclose(scale, scales[int(np.argmin(errors))], rtol=1e-4)
    assert awq.error([first, second], scale, measured["hessian"], grid) == pytest.approx(min(errors), rel=0.02)  # ties
    assert awq.error([first], np.ones(32, np.float32), measured["hessian"], grid) > 0


def test_awq_then_gptq_compose_through_the_scaled_statistics() -> None:
    weight, _, measured = layer(30, 64, 6)
    grid = Grid(3, 32)
    scale = awq.solve([weight], measured, awq.Config(grid, rows=8))
    scaled = scaling.scaled(measured, scale)
    h = measured["hessian"]
    folded = gptq.solve(scaling.into_columns(weight, scale), scaled, gptq.Config(grid)).decode() / scale
    plain = rtn.solve(weight, measured, rtn.Config(grid)).decode()
    rounded = rtn.solve(scaling.into_columns(weight, scale), scaled, rtn.Config(grid)).decode() / scale
    lost = [linalg.relative_loss(weight, each, h) for each in (folded, rounded, plain)]
    assert lost[0] < lost[1] < lost[2]


@pytest.mark.parametrize("order", [1, 2, 4, 8, 12, 20, 24, 28, 36, 40, 44, 60, 64, 76, 108, 140, 148, 256, 896])
def test_hadamard_matrices_are_orthogonal_signs(order: int) -> None:
    h = rotation.hadamard(order)
    assert set(np.unique(h)) <= {-1.0, 1.0}
    np.testing.assert_array_equal(h @ h.T, order * np.eye(order))


@pytest.mark.parametrize("order", [3, 6, 92, 172])
def test_orders_that_have_no_matrix_here_are_refused(order: int) -> None:
    with pytest.raises(BadInput, match=f"no Hadamard matrix of order {order}"):
        rotation.hadamard(order)
    with pytest.raises(BadInput, match="does not divide"):
        rotation.random_rotation(order, 0, block=order + 1)


@pytest.mark.parametrize(
    ("width", "block"),
    [(2048, 2048), (5632, 5632), (4096, 4096), (14336, 14336), (13824, 13824), (9728, 9728), (11008, 11008), (172, 4)],
)
def test_widths_of_models_are_mixed_whole(width: int, block: int) -> None:
    assert rotation.largest_block(width) == block


@pytest.mark.parametrize(("size", "block"), [(1, None), (7, None), (48, None), (48, 12), (1024, None), (560, None)])
def test_rotations_are_orthogonal_and_undone(size: int, block: int | None) -> None:
    turn = rotation.random_rotation(size, 3, block)
    q = turn.rows(np.eye(size, dtype=np.float32)).astype(np.float64)
    np.testing.assert_allclose(q @ q.T, np.eye(size), atol=1e-5)
    x = np.random.default_rng(0).standard_normal((5, 3, size)).astype(np.float32)
    np.testing.assert_allclose(turn.rows(x), x @ q, atol=1e-4)
    np.testing.assert_allclose(turn.rows_back(turn.rows(x)), x, atol=1e-5)
    if block:
        assert (q[:block, block:] == 0).all()
    assert (rotation.random_rotation(size, 3, block).signs == turn.signs).all()


def test_a_rotated_pair_of_layers_computes_the_same() -> None:
    """A norm's gain absorbed, one layer's outputs and the next one's inputs turned: x → RMS norm → W₁ → W₂."""
    rng = np.random.default_rng(1)
    turn = rotation.random_rotation(24, 5)
    gain, bias = rng.standard_normal(24).astype(np.float32), rng.standard_normal(24).astype(np.float32)
    make, read = rng.standard_normal((24, 10)).astype(np.float32), rng.standard_normal((6, 24)).astype(np.float32)
    z = rng.standard_normal((8, 10)).astype(np.float32)

    def norm(y: np.ndarray) -> np.ndarray:
        return y / np.sqrt((y**2).mean(axis=1, keepdims=True))

    before = (norm(z @ make.T + bias) * gain) @ read.T
    turned = norm(z @ turn.output_side(make).T + turn.output_side(bias))
    after = turned @ turn.input_side(rotation.absorb_gain(read, gain)).T
    np.testing.assert_allclose(after, before, atol=1e-4)


def test_rotated_statistics_and_what_rotating_is_for() -> None:
    weight, x, measured = layer(40, 64, 7)
    weight[:, 5] *= 30  # an outlier channel
    turn = rotation.random_rotation(64, 0)
    after = turn.statistics(measured)
    expected = statistics(turn.rows(x))
    for name, value in after.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-3, atol=1e-4 * np.abs(expected[name]).max())
    grid = Grid(4, -1)
    plain = rtn.solve(weight, measured, rtn.Config(grid)).decode()
    rotated = turn.rows_back(rtn.solve(turn.input_side(weight), after, rtn.Config(grid)).decode())
    assert np.square(rotated - weight).sum() < 0.5 * np.square(plain - weight).sum()


def test_what_is_wrong_is_named() -> None:
    weight, _, measured = layer(3, 8, 0)
    with pytest.raises(BadInput, match=r"read one input; these have \[7, 8\] columns"):
        awq.solve([weight, weight[:, :7]], measured, awq.Config(Grid(4, -1)))
    with pytest.raises(BadInput, match="needs calibration"):
        smoothquant.solve([weight], Statistics(), smoothquant.Config())
    with pytest.raises(BadRecipe, match="strength=2: give a number from 0 to 1"):
        smoothquant.Config(2)
    with pytest.raises(BadRecipe, match="tries=0"):
        awq.Config(Grid(4), tries=0)
    with pytest.raises(BadInput, match="a rotation of 8 columns was given 7"):
        rotation.random_rotation(8, 0).rows(weight[:, :7])
    np.testing.assert_array_equal(scaling.level(np.array([0.0, np.inf])), [1, 1])
