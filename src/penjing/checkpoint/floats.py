"""How weights of small floats lie in a checkpoint: the tensors of compressed-tensors' formats, both ways.

float-quantized       X.weight float8_e4m3fn (out, in) · X.weight_scale (out, 1), (1,), or (out / 128, in / 128)
                      · X.input_scale (1,), where a step for the layer's input was found by calibration
mxfp4-pack-quantized  X.weight_packed uint8 (out, in / 2) · X.weight_scale uint8 (out, in / 32), exponents
nvfp4-pack-quantized  X.weight_packed uint8 (out, in / 2) · X.weight_scale float8_e4m3fn (out, in / 16)
                      · X.weight_global_scale float32 (1,), what steps are divided by
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import BadCheckpoint, Unsupported
from ..formats import floats
from ..formats.affine import PER_CHANNEL, PER_TENSOR, SCALE_DTYPES
from ..formats.floats import BIAS, E4M3, FP8_BLOCK, FloatGrid, FloatTensor
from ..recipe import Quantize
from .tensors import TensorInfo

Array = NDArray[Any]
FLOAT, MXFP4, NVFP4 = "float-quantized", "mxfp4-pack-quantized", "nvfp4-pack-quantized"
# What compressed-tensors calls weights of FP8 whose inputs stay floats: the same tensors.
NAIVE = "naive-quantized"
LAYOUTS = {"fp8": FLOAT, "fp8-block": FLOAT, "mxfp4": MXFP4, "nvfp4": NVFP4}
FORMATS = (FLOAT, NAIVE, MXFP4, NVFP4)
INPUT_SCALE, DIVISOR = "input_scale", "weight_global_scale"
_NOT_A_NUMBER = 0x7F  # of E4M3, the sign aside
_NO_EXPONENT = 255
_SCALES = {np.dtype(dtype): name for name, dtype in SCALE_DTYPES.items()}

# Checks one tensor: (its name, dtypes that are right, its shape)
Expect = Callable[[str, list[Any], tuple[int, ...]], None]


def read_grid(weights: Mapping[str, Any], layout: str, where: str) -> FloatGrid:
    """The grid of a group's ``weights`` of type float; Unsupported names what Penjing cannot decode."""
    bits, strategy, group = weights.get("num_bits"), weights.get("strategy"), weights.get("group_size")
    blocks = weights.get("block_structure")
    if weights.get("type") != "float" or weights.get("dynamic") or not weights.get("symmetric", True):
        raise Unsupported(f"{where}: {layout} of type {weights.get('type')!r}; Penjing reads fixed, symmetric floats")
    if layout in (FLOAT, NAIVE) and bits == 8 and strategy in ("channel", "tensor"):
        return FloatGrid("fp8", PER_CHANNEL if strategy == "channel" else PER_TENSOR)
    if layout in (FLOAT, NAIVE) and bits == 8 and strategy == "block" and blocks == [FP8_BLOCK, FP8_BLOCK]:
        return FloatGrid("fp8-block", FP8_BLOCK)
    if layout == MXFP4 and (bits, strategy, group) == (4, "group", floats.MX_BLOCK):
        return FloatGrid("mxfp4", floats.MX_BLOCK)
    if layout == NVFP4 and (bits, strategy, group) == (4, "tensor_group", floats.NV_BLOCK):
        return FloatGrid("nvfp4", floats.NV_BLOCK)
    raise Unsupported(
        f"{where}: floats of {bits} bits, {strategy} {blocks or group} in {layout}; Penjing reads fp8 by channel,"
        f" tensor or blocks of {FP8_BLOCK}, mxfp4 and nvfp4"
    )


def check(parts: Mapping[str, Array | TensorInfo], grid: FloatGrid, shape: tuple[int, int], expect: Expect) -> None:
    """Tell ``expect`` of every tensor that a weight (out, in) of that grid has."""
    rows, columns = shape
    groups = grid.groups(columns)
    if grid.bits == 4:
        expect("weight_packed", [np.uint8], (rows, columns // 2))
        expect("weight_scale", [E4M3 if grid.kind == "nvfp4" else np.uint8], (rows, groups))
    else:
        expect("weight", [E4M3], shape)
        steps = (1, 1) if grid.group_size == PER_TENSOR else (-(-rows // grid.height), groups)
        expect("weight_scale", list(_SCALES), steps)
    if grid.kind == "nvfp4":
        expect(DIVISOR, [np.float32], (1,))
    if INPUT_SCALE in parts:
        expect(INPUT_SCALE, list(_SCALES), (1,))


def shape_of(parts: Mapping[str, Array | TensorInfo]) -> tuple[int, ...] | None:
    """(out, in) of a weight of four-bit floats, two in a byte; None for another one."""
    packed = parts.get("weight_packed")
    if packed is None or packed.dtype != np.uint8 or len(packed.shape) != 2:
        return None
    return packed.shape[0], 2 * packed.shape[1]


def decode(parts: Mapping[str, Array], grid: FloatGrid, shape: tuple[int, int], where: str) -> FloatTensor:
    """A module's tensors, checked, as its weight. BadCheckpoint for a code or a step that is no number."""
    raw, divisor = parts["weight_scale"], np.float32(1)
    if grid.bits == 8:
        codes = parts["weight"].view(np.uint8).reshape(shape)
        grid = dataclasses.replace(grid, scale_dtype=_SCALES[raw.dtype])
        if (codes & np.uint8(_NOT_A_NUMBER) == _NOT_A_NUMBER).any():
            raise BadCheckpoint(f"{where}.weight has a NaN")
    else:
        codes = floats.unpack(parts["weight_packed"])
    if grid.kind == "mxfp4":
        if (raw == _NO_EXPONENT).any():
            raise BadCheckpoint(f"{where}.weight_scale has a NaN")
        scale = np.ldexp(np.float32(1), raw.astype(np.int32) - BIAS).astype(np.float32)
    else:
        scale = raw.astype(np.float32)
    if grid.kind == "nvfp4":
        divisor = np.float32(parts[DIVISOR].reshape(-1)[0])
        if not divisor > 0:
            raise BadCheckpoint(f"{where}.{DIVISOR} is {divisor}; a number above 0 is right")
    if not np.isfinite(scale).all():
        raise BadCheckpoint(f"{where}.weight_scale has a NaN")
    rows = 1 if grid.group_size == PER_TENSOR else -(-shape[0] // grid.height)
    scale = np.repeat(scale.reshape(rows, -1), grid.height, axis=0)[: max(shape[0], 1)]
    return FloatTensor(codes, np.ascontiguousarray(scale), divisor, grid)


def encode(tensor: FloatTensor) -> dict[str, Array]:
    """A weight → the tensors it is stored in, named without "X."."""
    grid = tensor.grid
    if grid.bits == 8:
        scale = tensor.scale[:: grid.height].astype(SCALE_DTYPES[grid.scale_dtype])
        by_tensor = grid.group_size == PER_TENSOR
        return {"weight": tensor.codes.view(E4M3), "weight_scale": scale.reshape(1) if by_tensor else scale}
    codes = {"weight_packed": floats.pack(tensor.codes)}
    if grid.kind == "mxfp4":
        return codes | {"weight_scale": floats.exponents(tensor.scale)}
    return codes | {"weight_scale": tensor.scale.astype(E4M3), DIVISOR: np.array([tensor.divisor], np.float32)}


def nbytes(quantize: Quantize, shape: tuple[int, int], step_bytes: int) -> int:
    """What `encode` of a weight of that shape takes, the step of its input with it."""
    rows, columns = shape
    grid = FloatGrid(quantize.format, quantize.group_size)
    steps = 1 if grid.group_size == PER_TENSOR else -(-rows // grid.height) * grid.groups(columns)
    inputs = step_bytes if quantize.activations == "fp8-static" else 0
    if grid.bits == 8:
        return rows * columns + steps * step_bytes + inputs
    return rows * columns // 2 + steps + (4 if grid.kind == "nvfp4" else 0)


def weights_config(quantize: Quantize) -> dict[str, Any]:
    """A group's ``weights`` in ``quantization_config``."""
    bits = 8 if quantize.format.startswith("fp8") else 4
    config = {"num_bits": bits, "type": "float", "symmetric": True, "dynamic": False}
    if quantize.format == "fp8-block":
        return config | {"strategy": "block", "block_structure": [FP8_BLOCK, FP8_BLOCK]}
    if quantize.format == "fp8":
        return config | {"strategy": "channel" if quantize.group_size == PER_CHANNEL else "tensor"}
    by_group = {"group_size": quantize.group_size}
    if quantize.format == "mxfp4":
        return config | by_group | {"strategy": "group", "scale_dtype": "torch.uint8"}
    return config | by_group | {"strategy": "tensor_group", "scale_dtype": "torch.float8_e4m3fn"}


def inputs_config(quantize: Quantize) -> dict[str, Any] | None:
    """A group's ``input_activations``: FP8 found at run time by token (by block of it), or fixed; None for floats."""
    fp8 = {"num_bits": 8, "type": "float", "symmetric": True}
    if quantize.activations == "fp8-static":
        return fp8 | {"strategy": "tensor", "dynamic": False}
    if quantize.activations != "fp8":
        return None
    if quantize.format == "fp8-block":
        return fp8 | {"strategy": "group", "group_size": FP8_BLOCK, "dynamic": True}
    return fp8 | {"strategy": "token", "dynamic": True}


def read_inputs(inputs: Mapping[str, Any]) -> str | None:
    """The word for a group's ``input_activations``, as recipes say it; None for what is not known."""
    if inputs.get("num_bits") != 8 or inputs.get("type") != "float" or not inputs.get("symmetric", True):
        return None
    strategy = inputs.get("strategy")
    if inputs.get("dynamic") is True:
        known = strategy in ("token", None) or (strategy == "group" and inputs.get("group_size") == FP8_BLOCK)
        return "fp8" if known else None
    return "fp8-static" if strategy in ("tensor", None) and not inputs.get("dynamic") else None


def input_step(largest: float, dtype: np.dtype[Any]) -> dict[str, Array]:
    """The tensor, named without "X.", that has the step of an input whose largest number is that: one that holds it."""
    return {INPUT_SCALE: step_of(largest, dtype)}


def step_of(largest: float, dtype: np.dtype[Any]) -> Array:
    """The step (1,) that puts a largest number on FP8's; 1 where that is nothing, or too little for the dtype."""
    step = np.array([largest / float(floats.E4M3_LARGEST)], np.float32).astype(dtype)
    return np.where(step > 0, step, np.ones(1, dtype))
