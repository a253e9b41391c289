"""How a compressed weight lies in a checkpoint: the tensors of compressed-tensors' formats, both ways.

    pack-quantized   X.weight_packed int32 (out, words) · X.weight_scale (out, groups) · X.weight_shape int64 (2,)
                     · X.weight_zero_point int32 (words of out, groups): packed along the rows, unlike the codes
    int-quantized    X.weight int8 (out, in) · X.weight_scale (out, 1) · X.weight_zero_point int8 (out, 1)
    floats of 8 or 4 bits: see `floats`
    bitmask          X.weight.compressed · X.weight.bitmask uint8 · X.weight.row_offsets int64 · X.weight.shape int64
                     in place of X.weight or X.weight_packed; compressed holds what is not zero, row by row: floats, or
                     codes packed into int32 words

All but the last are read by vLLM and transformers; the bitmask by Penjing alone. What GPTQ's and AWQ's own tools write
is read too (`qweight`).
"""

from __future__ import annotations

import dataclasses
import re
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .. import kernels
from ..errors import BadCheckpoint, Unsupported
from ..formats import bitmask, packed
from ..formats.affine import PER_CHANNEL, PER_TENSOR, SCALE_DTYPES, AffineTensor, Grid, spread
from ..formats.bitmask import BitmaskTensor
from ..formats.floats import FloatGrid, FloatTensor
from ..recipe import Quantize
from . import floats, qweight
from .tensors import TensorInfo

Array = NDArray[Any]
Quantized = AffineTensor | FloatTensor
Weight = NDArray[Any] | Quantized | BitmaskTensor
SHAPES = ("weight_shape", "weight.shape")  # that say what packed words do not
PACKED, INT = "pack-quantized", "int-quantized"
SCALE_NAMES = {np.dtype(dtype): name for name, dtype in SCALE_DTYPES.items()}


@dataclass(frozen=True)
class Scheme:
    """A group of ``quantization_config``: how the weights of the modules that it targets are stored.

    activations: "int8" when a module quantizes what it is given, token by token; "fp8", "fp8-static" where other
    programs are to do so, which Penjing leaves undone.
    """

    grid: Grid | FloatGrid
    activations: Literal["float", "int8", "fp8", "fp8-static"]
    format: str
    targets: tuple[str, ...]

    def covers(self, module: str) -> bool:
        return any(matches(target, module) for target in self.targets)


def matches(pattern: str, module: str) -> bool:
    """compressed-tensors' way to name modules: exactly, by ``re:`` from the start, or by a class; "Linear" is all."""
    if pattern.startswith("re:"):
        try:
            return re.match(pattern[3:], module) is not None
        except re.error as error:
            raise BadCheckpoint(f"quantization_config: target {pattern!r} is no regular expression: {error}") from None
    return pattern in (module, "Linear")


def read_schemes(config: Mapping[str, Any], where: str) -> tuple[Scheme, ...]:
    """The schemes of a ``quantization_config``; Unsupported names what Penjing cannot decode."""
    method = config.get("quant_method") if isinstance(config, Mapping) else None
    if method == "mxfp4":
        return ()  # of gpt-oss's experts, which are no modules: `models.weights` reads them
    if method in (qweight.GPTQ, qweight.AWQ):
        kind, grid = qweight.read_format(config, where)
        return (Scheme(grid, "float", kind, ("Linear",)),)
    if method not in ("compressed-tensors", "penjing"):
        raise Unsupported(f"{where}: quant_method {method!r}; Penjing reads compressed-tensors, gptq and awq")
    groups = config.get("config_groups") or {}
    if not isinstance(groups, Mapping) or not all(isinstance(group, Mapping) for group in groups.values()):
        raise BadCheckpoint(f"{where}: quantization_config.config_groups is not an object of objects")
    schemes = []
    for name, group in groups.items():
        weights, inputs = group.get("weights"), group.get("input_activations")
        here = f"{where}: quantization_config.config_groups.{name}"
        if not isinstance(weights, dict):
            raise Unsupported(f"{here}: weights are not quantized; Penjing reads int weights of 2 to 8 bits")
        layout = group.get("format") or config.get("format")
        if layout not in (PACKED, INT, *floats.FORMATS):
            raise Unsupported(f"{here}: format {layout!r}; Penjing reads {', '.join((PACKED, INT, *floats.FORMATS))}")
        known = _grid(weights, here) if layout in (PACKED, INT) else floats.read_grid(weights, layout, here)
        schemes.append(Scheme(known, _activations(inputs, known, here), layout, _targets(group, here)))
    return tuple(schemes)


def _targets(group: Mapping[str, Any], where: str) -> tuple[str, ...]:
    targets = group.get("targets") or ()
    if not isinstance(targets, list | tuple) or not all(isinstance(target, str) for target in targets):
        raise BadCheckpoint(f"{where}: targets = {targets!r:.60}, expected a list of names")
    return tuple(targets)


def _grid(weights: Mapping[str, Any], where: str) -> Grid:
    if weights.get("type", "int") != "int" or weights.get("dynamic"):
        raise Unsupported(f"{where}: weights of type {weights.get('type')!r}; Penjing reads fixed integers")
    if weights.get("actorder") in ("group", "dynamic"):
        raise Unsupported(f"{where}: actorder={weights['actorder']!r} shuffles the columns of groups")
    group_size = weights.get("group_size")
    strategy = weights.get("strategy") or (
        "tensor" if group_size is None else "channel" if group_size == -1 else "group"
    )
    size = {"tensor": PER_TENSOR, "channel": PER_CHANNEL, "group": group_size}.get(str(strategy))
    if not isinstance(size, int):
        raise Unsupported(f"{where}: strategy {strategy!r} with group_size {group_size!r}")
    return Grid(weights.get("num_bits", 8), size, bool(weights.get("symmetric", True)))


def _activations(inputs: Any, grid: Grid | FloatGrid, where: str) -> Any:
    if inputs is None:
        return "float"
    if not isinstance(inputs, Mapping):
        raise BadCheckpoint(f"{where}: input_activations = {inputs!r:.60}, expected an object or null")
    if isinstance(grid, FloatGrid):
        if grid.bits == 8 and (known := floats.read_inputs(inputs)) is not None:
            return known
        raise Unsupported(f"{where}: input_activations other than FP8 beside weights of FP8")
    integer = inputs.get("num_bits") == 8 and inputs.get("type", "int") == "int"
    by_token = inputs.get("dynamic") is True and inputs.get("strategy") in ("token", None)
    if integer and by_token and inputs.get("symmetric", True):
        return "int8"
    raise Unsupported(f"{where}: input_activations other than dynamic symmetric int8 by token")


def check(
    parts: Mapping[str, Array | TensorInfo], scheme: Scheme | None, where: str, shape: tuple[int, ...] | None = None
) -> tuple[int, int]:
    """Do a module's stored tensors (named without "X.", or their headers) make a weight? → its shape (out, in).

    scheme: None for floats, whose bitmask it is.  where: the module, for errors.  shape: that is called for.
    BadCheckpoint names the first tensor that is missing, or of another shape or dtype than the rest calls for.
    """
    packed_by_others = scheme.format if scheme is not None and scheme.format in qweight.FORMATS else None
    found = _shape(parts, where) if packed_by_others is None else qweight.check(parts, packed_by_others, where)
    if shape is not None and found != shape:
        raise BadCheckpoint(f"{where}.weight has shape {found}, config.json calls for {shape}")
    if len(found) != 2:
        raise BadCheckpoint(f"{where}.weight has shape {found}; a compressed weight is a matrix")
    if packed_by_others is not None:
        return found[0], found[1]
    if scheme is not None and isinstance(scheme.grid, FloatGrid):
        _check_floats(parts, scheme.grid, (found[0], found[1]), where)
        return found[0], found[1]
    if scheme is not None:
        assert isinstance(scheme.grid, Grid)
        _check_steps(parts, scheme.grid, found, where)
    if "weight.compressed" in parts:
        _expect(parts, "weight.bitmask", [np.uint8], (found[0], -(-found[1] // 8)), where)
        _expect(parts, "weight.compressed", SCALE_NAMES if scheme is None else [np.int32], None, where)
        if scheme is None:
            _expect(parts, "weight.row_offsets", [np.int64], (found[0],), where)
    elif scheme is None:
        raise BadCheckpoint(f"{where}.weight_scale is missing; there are only {', '.join(sorted(parts))}")
    elif scheme.format == PACKED:
        _expect(parts, "weight_packed", [np.int32], (found[0], packed.words(found[1], scheme.grid.bits)), where)
    else:
        _expect(parts, "weight", [np.int8], found, where)
    return found


def _check_floats(parts: Mapping[str, Array | TensorInfo], grid: FloatGrid, shape: tuple[int, int], where: str) -> None:
    if grid.group_size > 0 and shape[1] % grid.group_size:
        raise BadCheckpoint(f"{where}.weight has {shape[1]} columns, its scheme blocks of {grid.group_size}")
    floats.check(parts, grid, shape, lambda part, dtypes, right: _expect(parts, part, dtypes, right, where))


def _check_steps(parts: Mapping[str, Array | TensorInfo], grid: Grid, shape: tuple[int, int], where: str) -> None:
    rows, columns = shape
    if grid.group_size > 0 and columns % grid.group_size:
        raise BadCheckpoint(f"{where}.weight has {columns} columns, its scheme groups of {grid.group_size}")
    groups = 1 if grid.group_size <= 0 else columns // grid.group_size
    each = (1, 1) if grid.group_size == PER_TENSOR else (rows, groups)
    _expect(parts, "weight_scale", SCALE_NAMES, each, where)
    if grid.symmetric:
        return
    zero = parts.get("weight_zero_point")
    words = zero is not None and zero.dtype == np.int32
    right = (packed.words(rows, grid.bits), groups) if words else each
    _expect(parts, "weight_zero_point", [np.int32, np.int8], right, where)


def _expect(
    parts: Mapping[str, Array | TensorInfo], part: str, dtypes: Iterable[Any], shape: tuple[int, ...] | None, where: str
) -> None:
    """BadCheckpoint unless a tensor is there, of one of the dtypes and the shape; ones at its end may be left out."""
    if part not in parts:
        raise BadCheckpoint(f"{where}.{part} is missing; there are only {', '.join(sorted(parts))}")
    found, right = parts[part], [np.dtype(each) for each in dtypes]
    if found.dtype not in right:
        raise BadCheckpoint(f"{where}.{part} has dtype {found.dtype}; {' or '.join(map(str, right))} is right")
    if shape is not None and _without_ones(found.shape) != _without_ones(shape):
        raise BadCheckpoint(f"{where}.{part} has shape {found.shape}, the weight calls for {shape}")


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    while shape and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def decode(parts: Mapping[str, Array], scheme: Scheme | None, where: str) -> Weight:
    """A module's tensors (named without "X.") → its weight on the grid; without a scheme, the floats that are kept.

    Of GPTQ with scattered groups float32: see `qweight.decode`.
    """
    shape = check(parts, scheme, where)
    if scheme is not None and scheme.format in qweight.FORMATS:
        return qweight.decode(parts, scheme.format, where)
    if scheme is None:
        return _sparse_floats(parts, shape, where)
    if isinstance(scheme.grid, FloatGrid):
        return floats.decode(parts, scheme.grid, shape, where)
    raw = parts["weight_scale"]
    grid = dataclasses.replace(scheme.grid, scale_dtype=SCALE_NAMES[raw.dtype])
    scale = np.ascontiguousarray(raw.astype(np.float32)).reshape(1 if grid.group_size == PER_TENSOR else shape[0], -1)
    zero_point = None if grid.symmetric else _zero_point(parts["weight_zero_point"], grid, scale.shape)
    return AffineTensor(_codes(parts, grid, shape, zero_point, where), scale, zero_point, grid)


def _zero_point(raw: Array, grid: Grid, shape: tuple[int, ...]) -> NDArray[np.int8]:
    if raw.dtype == np.int32:
        return np.ascontiguousarray(kernels.unpack(np.ascontiguousarray(raw.T), grid.bits, shape[0]).T)
    return np.ascontiguousarray(raw.reshape(shape))


def layout(quantize: Quantize) -> str:
    """The compressed-tensors format for these settings: its readers want W8A8 unpacked and other integers packed."""
    if quantize.format != "int":
        return floats.LAYOUTS[quantize.format]
    return INT if quantize.activations == "int8" else PACKED


def encode(weight: Weight, quantize: Quantize | None, *, sparse: bool) -> dict[str, Array]:
    """A solved weight → the tensors it is stored in, named without "X."; sparse: as bitmask and non-zeros."""
    if isinstance(weight, AffineTensor):
        as_int = quantize is not None and layout(quantize) == INT and not sparse
        return {"weight": weight.codes} | steps(weight) if as_int else encode_packed(weight, sparse=sparse)
    if isinstance(weight, FloatTensor):
        return floats.encode(weight)
    if isinstance(weight, BitmaskTensor):
        return _sparse_parts(weight, lambda values: values)
    return encode_sparse(weight) if sparse else {"weight": weight}


def dense(weight: Weight, format: str | None) -> dict[str, Array]:
    """A weight → the tensors of a format that others read, named without "X."; None for a weight that has no steps."""
    if isinstance(weight, AffineTensor):
        return {"weight": weight.codes} | steps(weight) if format == INT else encode_packed(weight)
    if isinstance(weight, FloatTensor):
        return floats.encode(weight)
    return {"weight": weight.decode() if isinstance(weight, BitmaskTensor) else weight}


def checksum(weight: Weight) -> int:
    """A CRC-32 of a weight's numbers (codes, steps and zero points, or floats), however they are stored."""
    if isinstance(weight, AffineTensor):
        parts: tuple[Array | None, ...] = (weight.codes, weight.scale.astype(np.float32), weight.zero_point)
    elif isinstance(weight, FloatTensor):
        parts = (weight.codes, weight.scale, np.array([weight.divisor]))
    else:
        parts = (weight.decode() if isinstance(weight, BitmaskTensor) else weight,)
    found = 0
    for part in parts:
        if part is not None:
            found = zlib.crc32(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data, found)
    return found


def count_zeros(weight: Weight) -> int:
    """How many of a weight's numbers are exactly zero."""
    if isinstance(weight, BitmaskTensor):
        return weight.shape[0] * weight.shape[1] - weight.values.size
    if isinstance(weight, AffineTensor):
        if weight.zero_point is not None:
            return int(np.count_nonzero(weight.codes == spread(weight.zero_point, weight.shape)))
        return weight.codes.size - int(np.count_nonzero(weight.codes))
    if isinstance(weight, FloatTensor):
        return weight.zeros()
    return weight.size - int(np.count_nonzero(weight))


def _shape(parts: Mapping[str, Array | TensorInfo], where: str) -> tuple[int, ...]:
    for name in SHAPES:
        if isinstance(stored := parts.get(name), np.ndarray):
            return tuple(int(size) for size in stored.reshape(-1))
    if (packed_floats := floats.shape_of(parts)) is not None:
        return packed_floats
    if "weight" not in parts:
        raise BadCheckpoint(f"{where}.weight_shape is missing; there are only {', '.join(sorted(parts))}")
    return parts["weight"].shape


def _codes(
    parts: Mapping[str, Array], grid: Grid, shape: tuple[int, int], zero_point: Array | None, where: str
) -> NDArray[np.int8]:
    if "weight_packed" in parts:
        return kernels.unpack(parts["weight_packed"].reshape(shape[0], -1), grid.bits, shape[1])
    if "weight.compressed" not in parts:
        return parts["weight"].reshape(shape)
    kept = bitmask.kept(parts["weight.bitmask"], shape[1])
    count = int(kept.sum())
    words = parts["weight.compressed"].reshape(1, -1)
    if words.shape[1] != packed.words(count, grid.bits):
        raise BadCheckpoint(f"{where}.weight.compressed has another number of codes than the {count} of its bitmask")
    codes = np.zeros(shape, np.int8) if zero_point is None else spread(zero_point, shape).copy()
    codes[kept] = kernels.unpack(words, grid.bits, count)[0]
    return codes


def _sparse_floats(parts: Mapping[str, Array], shape: tuple[int, int], where: str) -> BitmaskTensor:
    kept = int(bitmask.kept(parts["weight.bitmask"], shape[1]).sum())
    values, offsets = parts["weight.compressed"], parts["weight.row_offsets"]
    if values.shape != (kept,):
        raise BadCheckpoint(f"{where}.weight.compressed has shape {values.shape}, its bitmask keeps {kept} numbers")
    return BitmaskTensor(values, parts["weight.bitmask"], offsets, shape)


def encode_sparse(matrix: Array) -> dict[str, Array]:
    """A matrix of floats → the tensors of its bitmask, named without "X."."""
    return _sparse_parts(kernels.bitmask_encode(matrix), lambda values: values)


def encode_packed(tensor: AffineTensor, *, sparse: bool = False) -> dict[str, Array]:
    """A weight on a grid → pack-quantized tensors named without "X.", or its bitmask and the codes that are not 0."""
    bits = tensor.grid.bits
    if sparse:
        pruned = np.int8(0) if tensor.zero_point is None else spread(tensor.zero_point, tensor.shape)
        kept = tensor.codes != pruned
        places = kernels.bitmask_encode(kept.view(np.uint8))
        values = dataclasses.replace(places, values=tensor.codes[kept])
        parts = _sparse_parts(values, lambda codes: kernels.pack(codes[None], bits)[0])
    else:
        parts = {"weight_packed": kernels.pack(tensor.codes, bits), "weight_shape": np.array(tensor.shape, np.int64)}
    return parts | steps(tensor)


def steps(tensor: AffineTensor) -> dict[str, Array]:
    """weight_scale and, off the symmetric grid, the packed weight_zero_point of a weight."""
    parts: dict[str, Array] = {"weight_scale": tensor.scale.astype(SCALE_DTYPES[tensor.grid.scale_dtype])}
    if tensor.zero_point is not None:
        zero = kernels.pack(np.ascontiguousarray(tensor.zero_point.T), tensor.grid.bits)
        parts["weight_zero_point"] = np.ascontiguousarray(zero.T)
    return parts


def _sparse_parts(tensor: BitmaskTensor, pack: Callable[[Array], Array]) -> dict[str, Array]:
    return {
        "weight.compressed": pack(tensor.values),
        "weight.bitmask": tensor.bitmask,
        "weight.row_offsets": tensor.row_offsets,
        "weight.shape": np.array(tensor.shape, np.int64),
    }
