"""Weights as GPTQ's and AWQ's own tools pack them, onto Penjing's integer grid: the same codes, steps and zero points.

    X.scales (groups, out) · X.qzeros int32 (groups, words of out) · and
    gptq   X.qweight int32 (words of in, out) · X.g_idx int32 (in,): the group of each column
    awq    X.qweight int32 (in, words of out), of each eight codes those with even numbers first

Codes are unsigned, lowest bits first, a row or a column of them one stream of bits; a weight is
``(code − zero) · scale``. GPTQ's first version stores zero − 1, by subtracting from whole words.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import kernels
from ..errors import BadCheckpoint, Unsupported
from ..formats import packed
from ..formats.affine import PER_CHANNEL, SCALE_DTYPES, AffineTensor, Grid
from .tensors import TensorInfo

Array = NDArray[Any]
GPTQ, GPTQ_V2, AWQ = "gptq", "gptq_v2", "awq"
FORMATS = (GPTQ, GPTQ_V2, AWQ)
PARTS = ("qweight", "qzeros", "scales", "g_idx")
_BITS = {GPTQ: (2, 3, 4, 8), GPTQ_V2: (2, 3, 4, 8), AWQ: (4,)}
_ROWS = 256  # of scattered groups, that are made at a time
_AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]  # where each of eight codes lies
_SCALES = {np.dtype(dtype): name for name, dtype in SCALE_DTYPES.items()}


def read_format(config: Mapping[str, Any], where: str) -> tuple[str, Grid]:
    """Layout and grid that a ``quantization_config`` of quant_method gptq or awq names.

    The grid is what most weights have; each is read by the shapes of its own tensors. Unsupported names a layout for
    one kernel alone (marlin, gemv, …) or bits that are not read.
    """
    method = str(config["quant_method"])
    keys = ("checkpoint_format", "format") if method == GPTQ else ("version", "checkpoint_format", "format")
    kind = next((str(config[key]).lower() for key in keys if config.get(key)), method)
    kind = AWQ if method == AWQ and kind in ("gemm", AWQ) else kind
    if kind not in FORMATS or config.get("is_marlin_format"):
        raise Unsupported(f"{where}: {method} in the layout {kind!r}; Penjing reads gptq, gptq_v2 and AWQ's gemm")
    bits, size = config.get("bits", config.get("w_bit", 4)), config.get("group_size", config.get("q_group_size", 128))
    if bits not in _BITS[kind]:
        raise Unsupported(f"{where}: {method} with bits = {bits!r}; Penjing reads {_words(kind)}")
    if type(size) is not int or size < -1:
        raise BadCheckpoint(f"{where}: quantization_config.group_size = {size!r}, expected columns, or -1")
    symmetric = bool(config.get("sym", True)) if method == GPTQ else not config.get("zero_point", True)
    return kind, Grid(int(bits), size or PER_CHANNEL, symmetric)


def _words(kind: str) -> str:
    return ", ".join(map(str, _BITS[kind]))


def shape_of(shapes: Mapping[str, tuple[int, ...]], bits: int, kind: str) -> tuple[int, int]:
    """(out, in) of a weight from the shapes of its tensors, by their names."""
    if kind == AWQ:
        return shapes["scales"][-1], shapes["qweight"][0]
    return shapes["scales"][-1], shapes["g_idx"][0] if "g_idx" in shapes else shapes["qweight"][0] * 32 // bits


def in_order(groups: Array | None, columns: int, count: int) -> bool:
    """Do the columns of each of ``count`` groups follow one another, as many in each?"""
    return columns % count == 0 and (
        groups is None or np.array_equal(groups, np.arange(columns) // (columns // count)) or count == 1
    )


def check(parts: Mapping[str, Array | TensorInfo], kind: str, where: str) -> tuple[int, int]:
    """Do a module's tensors (named without "X."), or their headers, make a weight? → its shape (out, in).

    Raises BadCheckpoint where they do not fit one another, Unsupported for bits that are not read.
    """
    for part, dtypes in (("qweight", [np.int32]), ("qzeros", [np.int32]), ("scales", list(_SCALES))):
        if part not in parts:
            raise BadCheckpoint(f"{where}.{part} is missing; there are only {', '.join(sorted(parts))}")
        found = parts[part]
        if found.dtype not in dtypes or len(found.shape) != 2:
            words = " or ".join(str(np.dtype(each)) for each in dtypes)
            raise BadCheckpoint(f"{where}.{part} is {found.dtype} {found.shape}, expected a matrix of {words}")
    shapes = {name: each.shape for name, each in parts.items()}
    count, rows = shapes["scales"]
    bits = _bits(shapes)
    if bits not in _BITS[kind]:
        raise Unsupported(f"{where}.qzeros has {bits} bits in {kind}'s layout; Penjing reads {_words(kind)}")
    rows, columns = shape_of(shapes, bits, kind)
    right = (columns, packed.words(rows, bits)) if kind == AWQ else (packed.words(columns, bits), rows)
    if shapes["qweight"] != right or shapes["qzeros"] != (count, packed.words(rows, bits)) or not count:
        raise BadCheckpoint(
            f"{where}: qweight {shapes['qweight']}, qzeros {shapes['qzeros']} and scales {shapes['scales']} do not fit"
            " one another"
        )
    return rows, columns


def _bits(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return shapes["qzeros"][1] * 32 // max(shapes["scales"][1], 1)


def decode(parts: Mapping[str, Array], kind: str, where: str) -> AffineTensor | Array:
    """A module's tensors (named without "X.") → its weight; float32 where groups are not runs of columns.

    Raises what `check` raises, and BadCheckpoint for columns that are in no group.
    """
    rows, columns = check(parts, kind, where)
    qweight, qzeros, scales, groups = parts["qweight"], parts["qzeros"], parts["scales"], parts.get("g_idx")
    count, bits = len(scales), _bits({name: each.shape for name, each in parts.items()})
    if kind == AWQ:
        codes, zeros = (np.ascontiguousarray(_awq(each, rows).T) for each in (qweight, qzeros))
    else:
        codes = kernels.unpack(np.ascontiguousarray(qweight.T), bits, columns)
        zeros = np.ascontiguousarray(_zeros(qzeros, bits, rows, plus_one=kind == GPTQ).T)
    steps = np.ascontiguousarray(scales.T.astype(np.float32))
    if in_order(groups, columns, count):
        symmetric = not zeros.any()
        grid = Grid(bits, columns // count if count > 1 else PER_CHANNEL, symmetric, _SCALES[scales.dtype])
        return AffineTensor(codes, steps, None if symmetric else zeros, grid)
    if groups is None or groups.shape != (columns,) or groups.min() < 0 or groups.max() >= count:
        raise BadCheckpoint(f"{where}: g_idx does not say for each of {columns} columns which of {count} groups has it")
    numbers = np.empty(codes.shape, np.float32)
    for low in range(0, rows, _ROWS):
        part = slice(low, low + _ROWS)
        np.multiply(codes[part] - zeros[part, groups].astype(np.float32), steps[part, groups], out=numbers[part])
    return numbers


def _zeros(words: Array, bits: int, rows: int, *, plus_one: bool) -> NDArray[np.int8]:
    """Zero points int8 (groups, out), less half the range, as codes are."""
    if plus_one and 32 % bits == 0:
        words = (words.view(np.uint32) + np.uint32((2**32 - 1) // (2**bits - 1))).view(np.int32)
    zeros = kernels.unpack(np.ascontiguousarray(words), bits, rows)
    if plus_one and 32 % bits:
        half = 1 << (bits - 1)
        zeros = ((zeros.astype(np.int16) + half + 1) % (2 * half) - half).astype(np.int8)
    return zeros


def _awq(words: Array, rows: int) -> NDArray[np.int8]:
    """int32 (n, words of out) → codes int8 (n, out) in their order."""
    codes = kernels.unpack(np.ascontiguousarray(words), 4, rows)
    return codes.reshape(len(codes), -1, 8)[:, :, _AWQ_ORDER].reshape(len(codes), rows)
