"""How a compressed weight lies in a checkpoint: the tensors of compressed-tensors' formats, both ways.

    pack-quantized   X.weight_packed int32 (out, words) · X.weight_scale (out, groups) · X.weight_shape int64 (2,)
                     · X.weight_zero_point int32 (words of out, groups): packed along the rows, unlike the codes
    int-quantized    X.weight int8 (out, in) · X.weight_scale (out, 1) · X.weight_zero_point int8 (out, 1)
    bitmask          X.weight.compressed · X.weight.bitmask uint8 · X.weight.row_offsets int64 · X.weight.shape int64
                     in place of X.weight or X.weight_packed; compressed holds what is not zero, row by row: floats, or
                     codes packed into int32 words

The first two are read by vLLM and transformers; the bitmask by Penjing alone.
"""

from __future__ import annotations

import dataclasses
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .. import kernels
from ..errors import BadCheckpoint, Unsupported
from ..formats import bitmask, packed
from ..formats.affine import PER_CHANNEL, PER_TENSOR, SCALE_DTYPES, AffineTensor, Grid, spread
from ..formats.bitmask import BitmaskTensor
from ..recipe import Quantize

Array = NDArray[Any]
Weight = NDArray[Any] | AffineTensor | BitmaskTensor
PACKED, INT = "pack-quantized", "int-quantized"
SCALE_NAMES = {np.dtype(dtype): name for name, dtype in SCALE_DTYPES.items()}


@dataclass(frozen=True)
class Scheme:
    """A group of ``quantization_config``: how the weights of the modules that it targets are stored.

    activations: "int8" when a module quantizes what it is given, token by token.
    """

    grid: Grid
    activations: Literal["float", "int8"]
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
    if method not in ("compressed-tensors", "penjing"):
        raise Unsupported(f"{where}: quant_method {method!r}; Penjing reads compressed-tensors")
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
        if layout not in (PACKED, INT):
            raise Unsupported(f"{here}: format {layout!r}; Penjing reads {PACKED} and {INT}")
        schemes.append(Scheme(_grid(weights, here), _activations(inputs, here), layout, _targets(group, here)))
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
    size = {"tensor": PER_TENSOR, "channel": PER_CHANNEL, "group": group_size}.get(strategy)
    if not isinstance(size, int):
        raise Unsupported(f"{where}: strategy {strategy!r} with group_size {group_size!r}")
    return Grid(weights.get("num_bits", 8), size, bool(weights.get("symmetric", True)))


def _activations(inputs: Any, where: str) -> Literal["float", "int8"]:
    if inputs is None:
        return "float"
    if not isinstance(inputs, Mapping):
        raise BadCheckpoint(f"{where}: input_activations = {inputs!r:.60}, expected an object or null")
    integer = inputs.get("num_bits") == 8 and inputs.get("type", "int") == "int"
    by_token = inputs.get("dynamic") is True and inputs.get("strategy") in ("token", None)
    if integer and by_token and inputs.get("symmetric", True):
        return "int8"
    raise Unsupported(f"{where}: input_activations other than dynamic symmetric int8 by token")


def _zero_point(raw: Array | None, grid: Grid, rows: int, where: str) -> NDArray[np.int8] | None:
    if grid.symmetric:
        return None
    if raw is None:
        raise BadCheckpoint(f"{where}: weight_zero_point is missing; its scheme is not symmetric")
    if raw.dtype == np.int32:
        return np.ascontiguousarray(kernels.unpack(np.ascontiguousarray(raw.T), grid.bits, rows).T)
    return raw.astype(np.int8).reshape(rows if raw.size > 1 else 1, -1)


def decode(parts: Mapping[str, Array], scheme: Scheme, where: str) -> AffineTensor:
    """A module's quantized tensors (named without "X.") → its weight on the grid."""
    raw_scale = parts["weight_scale"]
    if raw_scale.dtype not in SCALE_NAMES:
        raise BadCheckpoint(f"{where}: weight_scale has dtype {raw_scale.dtype}; float32, float16 or bfloat16 is right")
    grid = Grid(scheme.grid.bits, scheme.grid.group_size, scheme.grid.symmetric, SCALE_NAMES[raw_scale.dtype])
    shape = _shape(parts, where)
    if len(shape) != 2:
        raise BadCheckpoint(f"{where}: weight has shape {shape}; a quantized weight is a matrix")
    groups = 1 if grid.group_size <= 0 else shape[1] / grid.group_size
    steps = (1, 1) if grid.group_size == PER_TENSOR else (shape[0], groups)
    if raw_scale.size != steps[0] * steps[1]:
        raise BadCheckpoint(f"{where}: weight_scale has shape {raw_scale.shape}, weight {shape} calls for {steps}")
    scale = np.ascontiguousarray(raw_scale.astype(np.float32)).reshape(steps[0], -1)
    if not np.isfinite(scale).all():
        raise BadCheckpoint(f"{where}: weight_scale has a NaN or an infinity")
    zero_point = _zero_point(parts.get("weight_zero_point"), grid, shape[0], where)
    if zero_point is not None and zero_point.shape != scale.shape:
        raise BadCheckpoint(f"{where}: weight_zero_point is {zero_point.shape}, weight_scale {scale.shape}")
    return AffineTensor(_codes(parts, grid, shape, zero_point, where), scale, zero_point, grid)


def layout(quantize: Quantize) -> str:
    """The compressed-tensors format for these settings: its readers want W8A8 unpacked and the rest packed."""
    return INT if quantize.activations == "int8" else PACKED


def encode(weight: Weight, quantize: Quantize | None, *, sparse: bool) -> dict[str, Array]:
    """A solved weight → the tensors it is stored in, named without "X."; sparse: as bitmask and non-zeros."""
    if isinstance(weight, AffineTensor):
        as_int = quantize is not None and layout(quantize) == INT and not sparse
        return {"weight": weight.codes} | steps(weight) if as_int else encode_packed(weight, sparse=sparse)
    if isinstance(weight, BitmaskTensor):
        return _sparse_parts(weight, lambda values: values)
    return encode_sparse(weight) if sparse else {"weight": weight}


def dense(weight: Weight, format: str | None) -> dict[str, Array]:
    """A weight → the tensors of a format that others read, named without "X."; None for a weight that has no steps."""
    if isinstance(weight, AffineTensor):
        return {"weight": weight.codes} | steps(weight) if format == INT else encode_packed(weight)
    return {"weight": weight.decode() if isinstance(weight, BitmaskTensor) else weight}


def checksum(weight: Weight) -> int:
    """A CRC-32 of a weight's numbers (codes, steps and zero points, or floats), however they are stored."""
    if isinstance(weight, AffineTensor):
        parts: tuple[Array | None, ...] = (weight.codes, weight.scale.astype(np.float32), weight.zero_point)
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
    return weight.size - int(np.count_nonzero(weight))


def _shape(parts: Mapping[str, Array], where: str) -> tuple[int, ...]:
    for name in ("weight_shape", "weight.shape"):
        if name in parts:
            return tuple(int(size) for size in parts[name].reshape(-1))
    if "weight" not in parts:
        raise BadCheckpoint(f"{where}: weight_shape is missing")
    return parts["weight"].shape


def _codes(
    parts: Mapping[str, Array], grid: Grid, shape: tuple[int, ...], zero_point: Array | None, where: str
) -> NDArray[np.int8]:
    rows, columns = shape
    if "weight_packed" in parts:
        raw = parts["weight_packed"]
        if raw.dtype != np.int32 or raw.shape != (rows, packed.words(columns, grid.bits)):
            raise BadCheckpoint(
                f"{where}: weight_packed is {raw.dtype} {raw.shape}; {grid.bits} bits of {shape} are int32"
                f" {(rows, packed.words(columns, grid.bits))}"
            )
        return kernels.unpack(raw, grid.bits, columns)
    if "weight.bitmask" not in parts:
        if "weight" not in parts:
            raise BadCheckpoint(f"{where}: weight_packed is missing; there are only {', '.join(sorted(parts))}")
        return parts["weight"].astype(np.int8, copy=False)
    kept = _bits(parts, (rows, columns), where)
    count = int(kept.sum())
    words = parts["weight.compressed"].reshape(1, -1)
    if words.dtype != np.int32 or words.shape[1] != packed.words(count, grid.bits):
        raise BadCheckpoint(f"{where}: the bitmask keeps {count} codes, weight.compressed has another number")
    codes = np.zeros((rows, columns), np.int8) if zero_point is None else spread(zero_point, (rows, columns)).copy()
    codes[kept] = kernels.unpack(words, grid.bits, count)[0]
    return codes


def _bits(parts: Mapping[str, Array], shape: tuple[int, int], where: str) -> NDArray[np.bool_]:
    mask = parts["weight.bitmask"]
    if mask.dtype != np.uint8 or mask.shape != (shape[0], -(-shape[1] // 8)):
        raise BadCheckpoint(f"{where}: weight.bitmask is {mask.dtype} {mask.shape}, which is wrong for weight {shape}")
    return bitmask.kept(mask, shape[1])


def decode_sparse(parts: Mapping[str, Array], where: str) -> BitmaskTensor:
    """A module's bitmask and floats (named without "X.") → the sparse matrix."""
    shape = _shape(parts, where)
    if len(shape) != 2:
        raise BadCheckpoint(f"{where}: weight.shape says {shape}; a bitmask is for a matrix")
    kept = int(_bits(parts, (shape[0], shape[1]), where).sum())
    values, offsets = parts["weight.compressed"], parts["weight.row_offsets"]
    if values.shape != (kept,) or offsets.shape != (shape[0],):
        raise BadCheckpoint(f"{where}: the bitmask keeps {kept} values, weight.compressed has {values.shape}")
    return BitmaskTensor(values, parts["weight.bitmask"], offsets.astype(np.int64), (shape[0], shape[1]))


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
