"""The kernels in plain numpy: slow, short, and the oracle that the native ones are tested against.

Same names, arguments and results as in `penjing.kernels`; integers agree bit for bit, sums of floats to rounding.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Literal

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ..errors import BadInput
from ..formats import affine, bitmask, packed
from ..formats.affine import SCALE_DTYPES, AffineTensor, Grid
from .stream import Steps

Floats = NDArray[np.float32]
GROUP_COLUMNS = 128  # that share a step of x, at most
ACTIVATION_GRID = Grid(8, affine.PER_CHANNEL, symmetric=False)


def matrix(x: Floats, weight: Floats, bias: Floats | None = None) -> Floats:
    """x (m, in) @ weight (out, in)ᵀ + bias, summed in float64."""
    y = x.astype(np.float64) @ weight.astype(np.float64).T
    return (y if bias is None else y + bias).astype(np.float32)


def add_gram(x: NDArray[Any], total: Floats) -> None:
    """total (n, n) += xᵀx of bfloat16 rows (m, n), summed in float64; all of it, as its mirror is the same."""
    rows = x.astype(np.float64)
    total += rows.T @ rows


def pair_product(a: Floats, low: int, high: int, b: Floats) -> Floats:
    """Columns [low, high) of a (k, m) and b (k, n), rounded to bfloat16: aᵀb, summed in float64."""
    left, right = (each.astype(ml_dtypes.bfloat16).astype(np.float64) for each in (a[:, low:high], b))
    return (left.T @ right).astype(np.float32)


def symmetric_rows(x: Floats) -> tuple[NDArray[np.int8], Floats]:
    """Codes and step of each row: s = absmax / 127.5, as compressed-tensors' dynamic per-token int8."""
    scale = np.abs(x).max(axis=1, initial=0, keepdims=True) / np.float32(127.5)
    scale = np.where(scale == 0, np.float32(1), scale)
    codes = np.clip(np.rint(x * (np.float32(1) / scale)), -128, 127)
    return codes.astype(np.int8), scale.astype(np.float32)


def int8_matrix(x: Floats, weight: AffineTensor, bias: Floats | None = None) -> Floats:
    """W8A8 dynamic: int8 rows of x times int8 weights (one step a row or a tensor), summed in int32, then the steps."""
    codes, step = symmetric_rows(x)
    centred = weight.codes.astype(np.int64)
    if weight.zero_point is not None:
        centred = centred - weight.zero_point
    sums = (codes.astype(np.int64) @ centred.T).astype(np.float32)
    y = sums * step * np.broadcast_to(weight.scale[:, 0], len(centred))
    return y if bias is None else y + bias


def segments(group: int, unit: int = 4) -> list[int]:
    """Where the parts of a group of columns end: equal ones of at most 128 columns, a multiple of ``unit``."""
    parts = -(-group // GROUP_COLUMNS)
    length = -(-group // (parts * unit)) * unit
    return [min(end, group) for end in range(length, parts * length + 1, length)]


def group_matrix(x: Floats, weight: AffineTensor, bias: Floats | None = None, unit: int = 4) -> Floats:
    """x @ weightᵀ + bias on integers: x on int8 with s = absmax / 127 a segment, sums exact, segments added in order.

    unit: columns that the weight's layout packs together (4 for bytes and sparse codes, 8 for 4 bits, 16 for 2, 32 for
    3); segments are a multiple of it, which matters only for groups that are none.
    """
    rows, columns = weight.shape
    groups = weight.scale.shape[1]
    centred = weight.codes.astype(np.int64)
    if weight.zero_point is not None:
        centred = centred - affine.spread(weight.zero_point, weight.shape)
    y = np.zeros((len(x), rows), np.float32)
    for g, begin in enumerate(range(0, columns, columns // groups)):
        start = begin
        for end in (begin + e for e in segments(columns // groups, unit)):
            part = x[:, start:end]
            step = np.abs(part).max(axis=1, initial=0, keepdims=True) / np.float32(127)
            inverse = np.divide(np.float32(1), step, out=np.zeros_like(step), where=step > 0)
            codes = np.clip(np.rint(part * inverse), -127, 127).astype(np.int64)
            sums = (codes @ centred[:, start:end].T).astype(np.float64)
            scale = np.broadcast_to(weight.scale, (rows, groups))[:, g]
            y = (y + sums * (step * scale)).astype(np.float32)  # rounded once, as a fused multiply-add
            start = end
    return y if bias is None else y + bias


def screen(weight: Floats) -> Floats:
    """What a screen keeps of a weight (out, in): codes of 8 bits times a step, absmax / 127, for 128 columns."""
    kept = np.empty_like(weight)
    for start in range(0, weight.shape[1], GROUP_COLUMNS):
        part = weight[:, start : start + GROUP_COLUMNS]
        step = np.abs(part).max(axis=1, keepdims=True) / np.float32(127)
        inverse = np.divide(np.float32(1), step, out=np.zeros_like(step), where=step > 0)
        kept[:, start : start + GROUP_COLUMNS] = np.clip(np.rint(part * inverse), -127, 127) * step
    return kept


def affine_activation(x: Floats, axes: tuple[int, ...], step: float | None, zero: int) -> tuple[Any, Any, Any]:
    """Codes int8, steps and zero points of activations; without a step, from the range over ``axes``."""
    if step is None:
        low, high = x.min(axis=axes, keepdims=True, initial=0), x.max(axis=axes, keepdims=True, initial=0)
        scale, zeros = affine.fit(low, high, ACTIVATION_GRID)
    else:
        scale, zeros = np.float32(step), np.int8(zero)
    codes = np.clip(np.rint(x * (np.float32(1) / scale) + np.float32(zeros)), -128, 127).astype(np.int8)
    return codes, scale, zeros


class IntegerLinear:
    """See `penjing.kernels.IntegerLinear`."""

    def __init__(
        self,
        codes: NDArray[np.int8],
        scale: Floats,
        zero_point: NDArray[np.int8] | None = None,
        bias: Floats | None = None,
        relu: bool = False,
    ) -> None:
        self.centred = codes.astype(np.int64)
        if zero_point is not None:
            self.centred = self.centred - zero_point.astype(np.int64)[:, None]
        self.scale, self.bias, self.relu = np.broadcast_to(scale, len(codes)), bias, relu

    def accumulate(self, x_codes: NDArray[np.int8], zero: int = 0) -> NDArray[np.int32]:
        return ((x_codes.astype(np.int64) - zero) @ self.centred.T).astype(np.int32)

    def __call__(self, x: Floats, step: float | None = None, zero: int = 0) -> Floats:
        codes, scale, zeros = affine_activation(x, (1,), step, zero)
        sums = ((codes.astype(np.int64) - zeros) @ self.centred.T).astype(np.float32)
        y = sums * scale * self.scale
        return _finish(y, self.bias, self.relu)


def _finish(y: Floats, bias: Floats | None, relu: bool) -> Floats:
    y = y if bias is None else y + bias
    return np.maximum(y, np.float32(0)) if relu else y


class IntegerConv:
    """See `penjing.kernels.IntegerConv`."""

    def __init__(
        self,
        codes: NDArray[np.int8],
        scale: Floats,
        zero_point: NDArray[np.int8] | None = None,
        bias: Floats | None = None,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        relu: bool = False,
    ) -> None:
        dims = codes.ndim - 2
        self.centred = codes.astype(np.int64)
        if zero_point is not None:
            self.centred = self.centred - zero_point.astype(np.int64).reshape(-1, *[1] * (dims + 1))
        self.stride, self.padding, self.dilation = (
            (value,) * dims if isinstance(value, int) else tuple(value) for value in (stride, padding, dilation)
        )
        self.scale, self.bias, self.groups, self.relu = np.broadcast_to(scale, len(codes)), bias, groups, relu

    def accumulate(self, x_codes: NDArray[np.int8], zero: int = 0) -> NDArray[np.int32]:
        return self._sums(x_codes.astype(np.int64) - zero).astype(np.int32)

    def __call__(self, x: Floats, step: float | None = None, zero: int = 0) -> Floats:
        codes, scale, zeros = affine_activation(x, tuple(range(1, x.ndim)), step, zero)
        ones = (1, -1, *[1] * (x.ndim - 2))
        y = self._sums(codes.astype(np.int64) - zeros).astype(np.float32) * scale * self.scale.reshape(ones)
        return _finish(y, None if self.bias is None else self.bias.reshape(ones), self.relu)

    def _sums(self, x: NDArray[np.int64]) -> NDArray[np.int64]:
        """Cross-correlation of centred activations (n, c, *spatial): one shifted product for each tap."""
        kernel = self.centred.shape[2:]
        x = np.pad(x, [(0, 0), (0, 0), *[(p, p) for p in self.padding]])
        size = [
            (length - d * (k - 1) - 1) // s + 1
            for length, k, s, d in zip(x.shape[2:], kernel, self.stride, self.dilation, strict=True)
        ]
        batch, outputs = x.shape[0], self.centred.shape[0]
        x = x.reshape(batch, self.groups, x.shape[1] // self.groups, *x.shape[2:])
        weight = self.centred.reshape(self.groups, outputs // self.groups, -1, *kernel)
        y = np.zeros((batch, self.groups, outputs // self.groups, *size), np.int64)
        all_of: Any = (slice(None), slice(None), slice(None))
        for tap in itertools.product(*map(range, kernel)):
            window = tuple(
                slice(t * d, t * d + s * (o - 1) + 1, s)
                for t, d, s, o in zip(tap, self.dilation, self.stride, size, strict=True)
            )

            y += np.einsum("goc,bgc...->bgo...", weight[all_of + tap], x[all_of + window])
        return y.reshape(batch, outputs, *size)


def quantize(weight: NDArray[Any], grid: Grid, mask: NDArray[np.bool_] | None = None) -> AffineTensor:
    """Min-max, round to nearest; what the mask does not keep counts as zero."""
    values = weight.astype(np.float32)
    if mask is not None:
        values = np.where(mask, values, np.float32(0))
    scale, zero_point = affine.fit(*affine.ranges(values, grid), grid)
    return AffineTensor(affine.encode(values, scale, zero_point, grid), scale, zero_point, grid)


def quantize_packed(
    weight: NDArray[Any], grid: Grid, mask: NDArray[np.bool_] | None = None
) -> tuple[NDArray[np.int32], Floats, NDArray[np.int8] | None]:
    tensor = quantize(weight, grid, mask)
    return packed.pack(tensor.codes, grid.bits), tensor.scale, tensor.zero_point


def prune_threshold(weight: NDArray[Any], sparsity: float) -> float:
    """The largest magnitude among the round(sparsity · size) smallest; 0 when there are none."""
    count = round(sparsity * weight.size)
    return float(np.sort(np.abs(weight.astype(np.float32)).ravel())[count - 1]) if count else 0.0


def prune(
    weight: NDArray[Any],
    sparsity: float,
    scope: Literal["row", "tensor"] = "tensor",
    pattern: tuple[int, int] | None = None,
) -> NDArray[Any]:
    """Zeros in place of the smallest magnitudes; of equal ones the first goes first."""
    rows, columns = weight.shape
    if pattern is not None:
        keep, of = pattern
        if columns % of:
            raise BadInput(f"pattern {keep}:{of} does not divide {columns} columns")
        parts, count = weight.reshape(-1, of), of - keep
    elif scope == "row":
        parts, count = weight, round(sparsity * columns)
    else:
        parts, count = weight.reshape(1, -1), round(sparsity * weight.size)
    order = np.argsort(np.abs(parts.astype(np.float32)), axis=1, kind="stable")[:, :count]
    pruned = parts.copy()
    np.put_along_axis(pruned, order, np.zeros((), weight.dtype), axis=1)
    return pruned.reshape(rows, columns)


def settle(
    base: Floats,
    coupling: Floats,
    reference: Floats,
    kept: NDArray[np.bool_] | None = None,
    steps: Steps | None = None,
) -> tuple[NDArray[np.int16] | None, Floats]:
    """Column by column, sums in order of columns, in float32."""
    error, codes = np.zeros_like(base), np.zeros(base.shape, np.int16)
    for i, best in enumerate(base.copy()):
        for j in range(i):
            best += coupling[j, i] * error[j]
        if steps is not None:
            g = steps.group[i]
            q = np.clip(np.rint(best * (np.float32(1) / steps.scale[g])), steps.low[g], steps.high[g])
            codes[i] = q if kept is None else q * kept[i]
            best = codes[i] * steps.scale[g]
        elif kept is not None:
            best = np.where(kept[i], best, np.float32(0))
        error[i] = reference[i] - best
    return None if steps is None else codes, error


def search_steps(values: Floats, importance: Floats, grid: Grid, shares: Floats, near: Floats) -> tuple[Floats, Floats]:
    """Columns in order, in float32; every 128 of them are summed up in float64."""
    h = np.broadcast_to(importance, values.shape)
    counted = np.where(h > 0, values, np.float32(0))
    low, high = np.minimum(counted.min(axis=0), 0), np.maximum(counted.max(axis=0), 0)
    span = np.float32((grid.qmax - grid.qmin) / 2 if grid.symmetric else grid.qmax - grid.qmin)
    reach = np.maximum(-low, high) if grid.symmetric else high - low

    def stored(step: Floats) -> Floats:
        kept = step.astype(SCALE_DTYPES[grid.scale_dtype]).astype(np.float32)
        return np.where((kept > 0) & np.isfinite(kept), kept, np.float32(1))

    def zero_for(low: Floats, step: Floats) -> Floats:
        if grid.symmetric:
            return np.zeros_like(step)
        return clamp(np.rint(np.float32(grid.qmin) - low / step))

    def clamp(code: Floats) -> Floats:
        return np.clip(code, grid.qmin, grid.qmax).astype(np.float32)

    def total(terms: Floats) -> Floats:
        blocks = np.split(terms, range(128, len(terms), 128))
        sums = [np.add.accumulate(each, axis=0)[-1].astype(np.float64) for each in blocks]
        return np.asarray(np.sum(sums, axis=0), np.float32)

    scale = stored((reach / span).astype(np.float32))
    zero, gain = zero_for(low, scale), np.zeros_like(scale)

    def judge(step: Floats, moved: Floats) -> None:
        nonlocal scale, zero, gain
        q = np.rint(np.clip(values * (np.float32(1) / step), grid.qmin - moved, grid.qmax - moved))
        along, power = total(h * values * q), np.maximum(total(q * q * h), np.float32(1e-30))
        better = (along * along / power > gain) & (along > 0)
        gain = np.where(better, along * along / power, gain)
        scale, zero = np.where(better, stored((along / power).astype(np.float32)), scale), np.where(better, moved, zero)

    for share in shares:
        step = np.maximum(reach * share / span, np.float32(1e-30))
        judge(step, zero_for(low * share, step))
    best, at = scale, zero
    for moved in () if grid.symmetric else (-1, 1):
        for share in near:
            judge(best * share, clamp(at + np.float32(moved)))
    return scale, zero


def has_nonfinite(array: NDArray[Any]) -> bool:
    return not bool(np.isfinite(array.astype(np.float32)).all())


pack, unpack = packed.pack, packed.unpack
bitmask_encode, bitmask_decode = bitmask.encode, bitmask.decode


def kept(x: Floats, kv_type: str) -> Floats:
    """What a cache of that type gives back for keys or values (…, elements)."""
    if kv_type == "float32":
        return x
    x = np.where(np.isfinite(x), x, np.float32(np.nan))
    if kv_type == "float16":
        return np.clip(x, -65504, 65504).astype(np.float16).astype(np.float32)
    if kv_type == "bfloat16":
        return x.astype(ml_dtypes.bfloat16).astype(np.float32)
    d = x.shape[-1]
    groups = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -d % 32)]).reshape(*x.shape[:-1], -1, 32)
    high, low = groups.max(axis=-1, keepdims=True), groups.min(axis=-1, keepdims=True)
    far = np.where(high > -low, high, low)
    step = np.abs(far) / np.float32(127) if kv_type == "int8" else far / np.float32(-8)
    step = step.astype(ml_dtypes.bfloat16).astype(np.float32)
    inverse = np.divide(np.float32(1), step, out=np.zeros_like(step), where=~(np.abs(step) < 1e-37))
    codes = np.clip(np.rint(groups * inverse), *((-127, 127) if kv_type == "int8" else (-8, 7)))
    return np.ascontiguousarray((codes * step).reshape(*x.shape[:-1], -1)[..., :d])


def causal_attention(
    queries: Floats,
    keys: Floats,
    values: Floats,
    *,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Floats | None = None,
) -> Floats:
    """See `penjing.kernels.causal_attention`; in float64. With fewer queries than keys they are the last ones."""
    heads, group, length = queries.shape[1], queries.shape[1] // keys.shape[1], len(keys)
    q, k, v = (each.astype(np.float64).swapaxes(0, 1) for each in (queries, keys, values))
    scores = q @ np.repeat(k, group, axis=0).swapaxes(1, 2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * np.tanh(scores / softcap)
    query, key = np.arange(length - len(queries), length)[:, None], np.arange(length)
    scores = np.where((key > query) | (key <= query - (window or length)), -np.inf, scores)
    sink = np.full(heads, -np.inf) if sinks is None else sinks.astype(np.float64)
    highest = np.maximum(scores.max(axis=-1), sink[:, None])[..., None]
    weights = np.exp(scores - highest)
    total = weights.sum(axis=-1, keepdims=True) + np.exp(sink[:, None, None] - highest)
    return np.ascontiguousarray((weights / total @ np.repeat(v, group, axis=0)).swapaxes(0, 1)).astype(np.float32)
