"""A module's tensors as they are stored: codes packed to their bits, pruned weights as bitmask and non-zeros.

Every tensor is named as in ``state_dict``, ``X.scale`` and ``X.zero`` beside its codes, ``X.mask`` beside its kept
values. The smaller of dense and bitmask is stored.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..errors import BadCheckpoint, Unsupported
from ..formats import affine, bitmask, packed
from ..formats.affine import SCALE_DTYPES, AffineTensor, Grid
from .layers import CodedLayer

Arrays = dict[str, NDArray[Any]]
SCALE, ZERO, MASK = ".scale", ".zero", ".mask"
# torch's dtypes that numpy has not: (numpy's from ml_dtypes, integers of the same width to pass the bytes through)
FOREIGN = {
    torch.bfloat16: (ml_dtypes.bfloat16, torch.int16, np.int16),
    torch.float8_e4m3fn: (ml_dtypes.float8_e4m3fn, torch.uint8, np.uint8),
    torch.float8_e5m2: (ml_dtypes.float8_e5m2, torch.uint8, np.uint8),
}


def to_numpy(tensor: Tensor) -> NDArray[Any]:
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype in FOREIGN:
        theirs, integers, _ = FOREIGN[tensor.dtype]
        return tensor.view(integers).numpy().view(theirs)
    if tensor.is_complex() or tensor.is_quantized:
        raise Unsupported(f"a tensor of {tensor.dtype} cannot be stored in safetensors")
    return tensor.numpy()


def to_torch(array: NDArray[Any]) -> Tensor:
    for dtype, (theirs, _, integers) in FOREIGN.items():
        if array.dtype == theirs:
            return torch.from_numpy(array.view(integers)).view(dtype)
    return torch.from_numpy(array)


def own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A module's own float parameters and persistent buffers, without codes and their steps."""
    coded = {f"{name}_{part}" for name in grids_of(module) for part in ("codes", "scale", "zero_point")}
    for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
        if tensor is not None and name not in coded and name not in module._non_persistent_buffers_set:
            yield name, tensor


def grids_of(module: nn.Module) -> dict[str, Grid]:
    return module.coded.grids if isinstance(module, CodedLayer) else {}


def encode_own(module: nn.Module) -> Arrays:
    """What a module's own tensors (not its children's) are stored as."""
    stored: Arrays = {}
    for name, tensor in own_tensors(module):
        stored |= encode_float(name, to_numpy(tensor))
    for name in grids_of(module):
        assert isinstance(module, CodedLayer)
        stored |= encode_affine(name, module.affine(name), module._buffers[f"{name}_codes"].shape)  # type: ignore
    return stored


def encode_float(name: str, array: NDArray[Any]) -> Arrays:
    kept = int(np.count_nonzero(array))
    if array.ndim < 2 or kept * array.itemsize + -(-array.size // 8) >= array.nbytes:
        return {name: array}
    sparse = bitmask.encode(array.reshape(len(array), -1))
    return {name: sparse.values, name + MASK: sparse.bitmask}


def encode_affine(name: str, tensor: AffineTensor, shape: tuple[int, ...]) -> Arrays:
    bits = tensor.grid.bits
    steps = np.broadcast_to(tensor.scale, (len(tensor.codes), tensor.scale.shape[1]))
    zero = (
        np.zeros(steps.shape, np.int8) if tensor.zero_point is None else np.broadcast_to(tensor.zero_point, steps.shape)
    )
    centred = tensor.codes.astype(np.int16).reshape(*steps.shape, -1) - zero[..., None]
    sparse = bitmask.encode(centred.reshape(tensor.codes.shape))
    stored: Arrays = {name + SCALE: tensor.scale.astype(SCALE_DTYPES[tensor.grid.scale_dtype])}
    if tensor.zero_point is not None:
        stored[name + ZERO] = tensor.zero_point
    if sparse.values.size * bits + sparse.bitmask.size * 8 < tensor.codes.size * bits:
        kept = tensor.codes[centred.reshape(tensor.codes.shape) != 0]
        return stored | {name: _pack(kept, bits), name + MASK: sparse.bitmask}
    return stored | {name: tensor.codes.reshape(shape) if bits == 8 else _pack(tensor.codes, bits)}


def _pack(codes: NDArray[np.int8], bits: int) -> NDArray[Any]:
    """One stream of all codes: int8 as they are, or int32 words."""
    return codes.reshape(-1) if bits == 8 else packed.pack(codes.reshape(1, -1), bits)[0]


def _unpack(stored: NDArray[Any], bits: int, count: int) -> NDArray[np.int8]:
    codes = stored.reshape(1, -1) if bits == 8 else packed.unpack(stored.reshape(1, -1), bits, count)
    return codes.reshape(-1)


def decode_float(name: str, stored: Arrays, shape: tuple[int, ...] | None) -> NDArray[Any]:
    """The inverse of `encode_float`; shape is needed where there is a mask."""
    if name + MASK not in stored:
        return stored[name]
    assert shape is not None
    rows, columns = shape[0], int(np.prod(shape[1:]))
    return bitmask.decode(stored[name], _mask(name, stored, rows, columns), (rows, columns)).reshape(shape)


def _mask(name: str, stored: Arrays, rows: int, columns: int) -> NDArray[np.uint8]:
    mask = stored[name + MASK]
    if mask.dtype != np.uint8 or mask.shape != (rows, -(-columns // 8)):
        raise BadCheckpoint(f"{name}: its mask {mask.dtype} {mask.shape} does not fit a weight of {rows} × {columns}")
    return mask


def decode_affine(name: str, stored: Arrays, grid: Grid, shape: tuple[int, ...]) -> AffineTensor:
    """The inverse of `encode_affine`. Raises BadCheckpoint where the parts contradict one another."""
    rows, columns = shape[0], int(np.prod(shape[1:]))
    scale, zero = stored[name + SCALE].astype(np.float32), stored.get(name + ZERO)
    groups = (1, 1) if grid.group_size == affine.PER_TENSOR else (rows, grid.groups(columns))
    if scale.shape != groups or (zero is None) != grid.symmetric or (zero is not None and zero.shape != groups):
        raise BadCheckpoint(f"{name}: steps {scale.shape} do not fit a weight of {rows} × {columns} on {grid}")
    if not np.isfinite(scale).all():
        raise BadCheckpoint(f"{name}: a step is not finite")
    count = rows * columns
    if name + MASK in stored:
        mask = _mask(name, stored, rows, columns)
        kept = bitmask.kept(mask, columns)
        count = int(kept.sum())
    expected = count if grid.bits == 8 else packed.words(count, grid.bits)
    if stored[name].size != expected or stored[name].dtype != (np.int8 if grid.bits == 8 else np.int32):
        raise BadCheckpoint(f"{name}: {stored[name].size} items of {stored[name].dtype} stored, {expected} needed")
    codes = _unpack(stored[name], grid.bits, count)
    if name + MASK in stored:
        steps = np.zeros(groups, np.int8) if zero is None else zero
        dense = affine.spread(steps, (rows, columns)).astype(np.int8)
        dense[kept] = codes
        codes = dense
    return AffineTensor(codes.reshape(rows, columns), scale, zero, grid)


def stored_bytes(module: nn.Module) -> int:
    """Bytes of a module's own tensors as stored."""
    return sum(array.nbytes for array in encode_own(module).values())


def total_bytes(root: nn.Module) -> int:
    """Bytes of all tensors as stored, tied ones once, without the file's header."""
    seen: set[int] = set()
    total = 0
    for part in root.modules():
        own = dict(own_tensors(part))
        own |= {name: part._buffers[f"{name}_codes"] for name in grids_of(part)}  # type: ignore[misc]
        sizes = encode_own(part)
        for name, tensor in own.items():
            if id(tensor) not in seen:
                seen.add(id(tensor))
                total += sum(
                    sizes[key].nbytes for key in (name, name + SCALE, name + ZERO, name + MASK) if key in sizes
                )
    return total
