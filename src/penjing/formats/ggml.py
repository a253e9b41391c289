"""ggml's number formats, as they lie in GGUF files: blocks of a row that share steps.

Every quantized format says ``value = scale · code − offset`` with a step for 16 or 32 codes; formats without an offset
are symmetric grids, so their integers can be computed with as they are. K-formats put 256 codes in a block and write
the steps of its groups as small integers times a float16. Layouts: the ``block_*`` structs of ggml (ggml-common.h).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float32]
Raw: TypeAlias = NDArray[np.uint8]


@dataclass(frozen=True)
class Codes:
    """Blocks taken apart: codes int8 (n, size), scale float32 (n, groups), offset the same, or None for none."""

    codes: NDArray[np.int8]
    scale: Floats
    offset: Floats | None

    def decode(self) -> Floats:
        """scale · code − offset: float32 (n, size)."""
        grouped = self.codes.reshape(*self.scale.shape, -1).astype(np.float32) * self.scale[..., None]
        if self.offset is not None:
            grouped -= self.offset[..., None]
        return grouped.reshape(self.codes.shape)


@dataclass(frozen=True)
class Kind:
    """A format.

    number: what files call it.  size: codes of a block.  group: codes that share a step; 0 for plain floats.  layout:
    a block's bytes.  low, high: the smallest and largest code.  symmetric: no offset.
    """

    name: str
    number: int
    size: int
    group: int
    layout: np.dtype[Any]
    low: int = 0
    high: int = 0
    symmetric: bool = True

    @property
    def is_float(self) -> bool:
        return self.group == 0

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.layout.itemsize / self.size

    def row_bytes(self, columns: int) -> int:
        return columns // self.size * self.layout.itemsize


def _kind(name: str, number: int, group: int, fields: list[Any], low: int, high: int, symmetric: bool = True) -> Kind:
    return Kind(name, number, 256 if name.endswith("_k") else 32, group, np.dtype(fields), low, high, symmetric)


_D, _M, _NIBBLES = ("d", "<f2"), ("m", "<f2"), ("qs", "u1", 16)
_HIGH = ("qh", "u1", 4)
KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("f32", 0, 1, 0, np.dtype("<f4")),
        Kind("f16", 1, 1, 0, np.dtype("<f2")),
        Kind("bf16", 30, 1, 0, np.dtype(ml_dtypes.bfloat16)),
        _kind("q4_0", 2, 32, [_D, _NIBBLES], -8, 7),
        _kind("q4_1", 3, 32, [_D, _M, _NIBBLES], 0, 15, False),
        _kind("q5_0", 6, 32, [_D, _HIGH, _NIBBLES], -16, 15),
        _kind("q5_1", 7, 32, [_D, _M, _HIGH, _NIBBLES], 0, 31, False),
        _kind("q8_0", 8, 32, [_D, ("qs", "i1", 32)], -128, 127),
        _kind("q2_k", 10, 16, [("sm", "u1", 16), ("qs", "u1", 64), _D, _M], 0, 3, False),
        _kind("q3_k", 11, 16, [("qh", "u1", 32), ("qs", "u1", 64), ("s", "u1", 12), _D], -4, 3),
        _kind("q4_k", 12, 32, [_D, _M, ("sm", "u1", 12), ("qs", "u1", 128)], 0, 15, False),
        _kind("q5_k", 13, 32, [_D, _M, ("sm", "u1", 12), ("qh", "u1", 32), ("qs", "u1", 128)], 0, 31, False),
        _kind("q6_k", 14, 16, [("ql", "u1", 128), ("qh", "u1", 64), ("s", "i1", 16), _D], -32, 31),
    )
}
BY_NUMBER = {kind.number: kind for kind in KINDS.values()}


def decode(kind: Kind, raw: Raw) -> NDArray[Any]:
    """Bytes of whole rows (rows, row bytes) → their numbers (rows, columns): float32, or the format's own float."""
    if kind.is_float:
        return raw.view(kind.layout)
    return unpack(kind, raw).decode().reshape(len(raw), -1)


def unpack(kind: Kind, raw: Raw) -> Codes:
    """Blocks of a quantized format, rows one after another, as integers and steps."""
    blocks = np.ascontiguousarray(raw).reshape(-1, kind.layout.itemsize).view(kind.layout)[:, 0]
    return _UNPACK[kind.name](blocks)


def _shifts(bytes_: NDArray[np.uint8], bits: int, run: int) -> NDArray[np.uint8]:
    """(n, bytes) → (n, bytes · 8 / bits): of each ``run`` bytes first all lowest fields of so many bits, then the next
    ones."""
    shift = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    fields = bytes_.reshape(len(bytes_), -1, 1, run) >> shift & np.uint8((1 << bits) - 1)
    return fields.reshape(len(bytes_), -1)


def _single(blocks: NDArray[Any], name: str) -> Floats:
    """A float16 of each block: (n, 1)."""
    return blocks[name].astype(np.float32)[:, None]


def _offset(blocks: NDArray[Any]) -> Floats | None:
    """Q4_1 and Q5_1 add what the K-formats take away."""
    return -_single(blocks, "m") if "m" in (blocks.dtype.names or ()) else None


def _unpack_4(blocks: NDArray[Any]) -> Codes:
    offset, codes = _offset(blocks), _shifts(blocks["qs"], 4, 16).view(np.int8)
    return Codes(codes if offset is not None else codes - np.int8(8), _single(blocks, "d"), offset)


def _unpack_5(blocks: NDArray[Any]) -> Codes:
    high = np.unpackbits(blocks["qh"], axis=1, bitorder="little") << np.uint8(4)
    offset, codes = _offset(blocks), (_shifts(blocks["qs"], 4, 16) | high).view(np.int8)
    return Codes(codes if offset is not None else codes - np.int8(16), _single(blocks, "d"), offset)


def _unpack_8(blocks: NDArray[Any]) -> Codes:
    return Codes(np.ascontiguousarray(blocks["qs"]), _single(blocks, "d"), None)


def _unpack_q2_k(blocks: NDArray[Any]) -> Codes:
    scale = _single(blocks, "d") * (blocks["sm"] & 15).astype(np.float32)
    offset = _single(blocks, "m") * (blocks["sm"] >> 4).astype(np.float32)
    return Codes(_shifts(blocks["qs"], 2, 32).view(np.int8), scale, offset)


def _unpack_q3_k(blocks: NDArray[Any]) -> Codes:
    """16 steps of 6 bits: the low four of each in the first 8 bytes, the high two in the last 4."""
    steps = _shifts(blocks["s"][:, :8], 4, 8) | _shifts(blocks["s"][:, 8:], 2, 4) << np.uint8(4)
    scale = _single(blocks, "d") * (steps.view(np.int8) - np.int8(32)).astype(np.float32)
    codes = _shifts(blocks["qs"], 2, 32) | _shifts(blocks["qh"], 1, 32) << np.uint8(2)
    return Codes(codes.view(np.int8) - np.int8(4), scale, None)


def _small_steps(blocks: NDArray[Any]) -> tuple[Floats, Floats]:
    """Steps and offsets of Q4_K's and Q5_K's eight groups: 6 bits each, those of the last four split in two."""
    a, b, c = np.split(blocks["sm"], 3, axis=1)
    steps = np.concatenate([a & 63, c & 15 | a >> 6 << 4], axis=1).astype(np.float32)
    offsets = np.concatenate([b & 63, c >> 4 | b >> 6 << 4], axis=1).astype(np.float32)
    return _single(blocks, "d") * steps, _single(blocks, "m") * offsets


def _unpack_q4_k(blocks: NDArray[Any]) -> Codes:
    return Codes(_shifts(blocks["qs"], 4, 32).view(np.int8), *_small_steps(blocks))


def _unpack_q5_k(blocks: NDArray[Any]) -> Codes:
    codes = _shifts(blocks["qs"], 4, 32) | _shifts(blocks["qh"], 1, 32) << np.uint8(4)
    return Codes(codes.view(np.int8), *_small_steps(blocks))


def _unpack_q6_k(blocks: NDArray[Any]) -> Codes:
    codes = _shifts(blocks["ql"], 4, 64) | _shifts(blocks["qh"], 2, 32) << np.uint8(4)
    scale = _single(blocks, "d") * blocks["s"].astype(np.float32)
    return Codes(codes.view(np.int8) - np.int8(32), scale, None)


_UNPACK: dict[str, Callable[[NDArray[Any]], Codes]] = {
    "q4_0": _unpack_4,
    "q4_1": _unpack_4,
    "q5_0": _unpack_5,
    "q5_1": _unpack_5,
    "q8_0": _unpack_8,
    "q2_k": _unpack_q2_k,
    "q3_k": _unpack_q3_k,
    "q4_k": _unpack_q4_k,
    "q5_k": _unpack_q5_k,
    "q6_k": _unpack_q6_k,
}
