"""What the compressor does to every weight, at the speed of memory; same results as `reference`, bit for bit."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from .. import _native
from ..errors import BadInput, Unsupported
from ..formats import affine
from ..formats.affine import AffineTensor, Grid
from ..formats.bitmask import BitmaskTensor
from ._bits import float_bits, is_bfloat16


def _quantize(weight: NDArray[Any], grid: Grid, mask: NDArray[np.bool_] | None, packed: bool) -> tuple[Any, Any, Any]:
    if weight.ndim != 2:
        raise BadInput(f"a weight of shape {weight.shape}: give a matrix (out, in)")
    groups = grid.groups(weight.shape[1])
    group = 0 if grid.group_size == affine.PER_TENSOR else weight.shape[1] // groups
    kept = None if mask is None else np.ascontiguousarray(mask, np.bool_).view(np.uint8)
    return _native.quantize(
        float_bits(weight), is_bfloat16(weight), grid.bits, group, grid.symmetric, grid.scale_dtype, kept, packed
    )


def quantize(weight: NDArray[Any], grid: Grid, mask: NDArray[np.bool_] | None = None) -> AffineTensor:
    """Min-max, round to nearest: a float weight (out, in) on a grid. What ``mask`` (True: kept) drops counts as 0."""
    return AffineTensor(*_quantize(weight, grid, mask, packed=False), grid)


def quantize_packed(
    weight: NDArray[Any], grid: Grid, mask: NDArray[np.bool_] | None = None
) -> tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.int8] | None]:
    """`quantize` and `pack` in one pass → packed int32 (out, words), scale, zero_point as in AffineTensor."""
    return _quantize(weight, grid, mask, packed=True)


def pack(codes: NDArray[np.int8], bits: int) -> NDArray[np.int32]:
    """`formats.packed.pack`: int8 (rows, columns) → int32 (rows, words)."""
    return _native.pack(np.ascontiguousarray(codes), bits)


def unpack(packed: NDArray[np.int32], bits: int, columns: int) -> NDArray[np.int8]:
    """`formats.packed.unpack`: int32 (rows, words) → int8 (rows, columns)."""
    return _native.unpack(np.ascontiguousarray(packed), bits, columns)


def prune(
    weight: NDArray[Any],
    sparsity: float,
    scope: Literal["row", "tensor"] = "tensor",
    pattern: tuple[int, int] | None = None,
) -> NDArray[Any]:
    """A copy of a float weight (out, in) with its smallest magnitudes zeroed; of equal ones the first go first.

    round(sparsity · size) weights go, counted in each row or in the whole tensor. ``pattern`` (n, m) instead keeps
    the n largest of every m neighbours in a row. L1 and L2 order single weights alike, so there is no norm to choose.
    """
    if weight.ndim != 2:
        raise BadInput(f"a weight of shape {weight.shape}: give a matrix (out, in)")
    if not 0 <= sparsity <= 1:
        raise BadInput(f"sparsity={sparsity}: give a share from 0 to 1")
    rows, columns = weight.shape
    if pattern is not None:
        keep, of = pattern
        if not 0 <= keep <= of or of < 1 or columns % of:
            raise BadInput(f"pattern {keep}:{of}: give kept:of with of dividing the {columns} columns")
        parts, count = rows * columns // of, of - keep
    elif scope in ("row", "tensor"):
        parts = rows if scope == "row" else 1
        count = round(sparsity * (weight.size // max(parts, 1)))
    else:
        raise BadInput(f"scope={scope!r}: known: row, tensor")
    pruned = np.array(weight, order="C")
    if weight.size:
        _native.prune(float_bits(pruned), is_bfloat16(pruned), parts, count)
    return pruned


def prune_threshold(weight: NDArray[Any], sparsity: float) -> float:
    """The largest magnitude among the round(sparsity · size) smallest of a float matrix; 0 when there are none."""
    count = round(sparsity * weight.size)
    return _native.prune_threshold(float_bits(weight), is_bfloat16(weight), count) if count else 0.0


class Steps(NamedTuple):
    """scale, low, high: float32 (groups, out), steps and the codes there are.  group: int32 (n,), each column's."""

    scale: NDArray[np.float32]
    low: NDArray[np.float32]
    high: NDArray[np.float32]
    group: NDArray[np.int32]


def settle(
    base: NDArray[np.float32],
    coupling: NDArray[np.float32],
    reference: NDArray[np.float32],
    kept: NDArray[np.bool_] | None = None,
    steps: Steps | None = None,
) -> tuple[Any, NDArray[np.float32]]:
    """Columns decided on one after the other: base (n, out), coupling (n, n) → codes int16 or None, error (n, out).

    Column i is best at base[i] + Σ_{j<i} coupling[j, i] · error[j]. There it is rounded to its group's steps, or stays
    without them; what ``kept`` (True: kept) drops is 0; error[i] is reference[i] less what it became. Codes are centred
    (code − zero point).
    """
    mask = None if kept is None else np.ascontiguousarray(kept, np.bool_).view(np.uint8)
    first, second, third = (np.ascontiguousarray(each, np.float32) for each in (base, coupling, reference))
    if steps is None:
        return _native.settle(first, second, third, mask, None, None, None, None, None)
    inverse = np.float32(1) / steps.scale
    group = np.ascontiguousarray(steps.group, np.int32)
    return _native.settle(first, second, third, mask, steps.scale, inverse, steps.low, steps.high, group)


def search_steps(
    values: NDArray[np.float32],
    importance: NDArray[np.float32],
    grid: Grid,
    shares: NDArray[np.float32],
    near: NDArray[np.float32],
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Steps of each output's weights with the least weighted squared error → scale, as stored, and zero point: (out,).

    values: (n, out).  importance: ≥ 0, (n, out) or (n, 1); what has none does not count.  shares: of the range from
    least to greatest that are tried.  near: shares of the best step that are tried with the zero points beside its own.
    """
    first, second, trials, beside = (
        np.ascontiguousarray(each, np.float32) for each in (values, importance, shares, near)
    )
    return _native.search_steps(first, second, grid.qmin, grid.qmax, grid.symmetric, grid.scale_dtype, trials, beside)


def has_nonfinite(array: NDArray[Any]) -> bool:
    """Whether a float array (any shape) has a NaN or an infinity."""
    return _native.has_nonfinite(float_bits(array).reshape(-1), is_bfloat16(array))


_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32}


def _as_unsigned(array: NDArray[Any]) -> NDArray[Any]:
    if array.dtype.itemsize not in _UNSIGNED:
        raise Unsupported(f"a bitmask over {array.dtype}: elements of 1, 2 or 4 bytes are supported")
    return np.ascontiguousarray(array).view(_UNSIGNED[array.dtype.itemsize])


def bitmask_encode(matrix: NDArray[Any]) -> BitmaskTensor:
    """`formats.bitmask.encode` for elements of 1, 2 or 4 bytes."""
    signed_zero = matrix.dtype.kind == "f" or matrix.dtype == ml_dtypes.bfloat16
    values, bitmask, row_offsets = _native.bitmask_encode(_as_unsigned(matrix), signed_zero)
    return BitmaskTensor(values.view(matrix.dtype), bitmask, row_offsets, (matrix.shape[0], matrix.shape[1]))


def bitmask_decode(values: NDArray[Any], bitmask: NDArray[np.uint8], shape: tuple[int, int]) -> NDArray[Any]:
    """`formats.bitmask.decode` for elements of 1, 2 or 4 bytes."""
    matrix: NDArray[Any] = _native.bitmask_decode(_as_unsigned(values), np.ascontiguousarray(bitmask), shape[1])
    return matrix.reshape(shape).view(values.dtype)
