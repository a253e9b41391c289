"""Numbers to ggml's blocks: the formats of 32 exactly as llama.cpp rounds them, K-formats by least squares.

`pack` writes given integers and steps, so that weights which are on such a grid already are not rounded again.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .ggml import Floats, Kind, Raw

# Formats that can be written.
ENCODED = ("f32", "f16", "bf16", "q4_0", "q4_1", "q5_0", "q8_0", "q4_k", "q5_k", "q6_k")
_TRIES = 20


def encode(kind: Kind, weight: Floats) -> Raw:
    """Numbers (rows, columns) → bytes (rows, row bytes); columns are a multiple of the format's block."""
    if kind.is_float:
        return np.ascontiguousarray(weight.astype(kind.layout)).view(np.uint8).reshape(len(weight), -1)
    x = np.ascontiguousarray(weight, np.float32).reshape(-1, kind.size)
    if kind.name in ("q4_k", "q5_k"):
        blocks = _encode_k(kind, x)
    elif kind.name == "q6_k":
        blocks = _encode_q6_k(kind, x)
    else:
        blocks = _encode_32(kind, x)
    return blocks.view(np.uint8).reshape(len(weight), -1)


def pack(kind: Kind, codes: NDArray[np.int8], scale: Floats, offset: Floats | None = None) -> Raw:
    """Codes (rows, columns) with a step (and an offset) for each 32 of them, (rows, columns / 32) → bytes of rows.

    Of Q4_0, Q4_1, Q5_0 and Q8_0; steps and offsets become float16.
    """
    blocks = _pack_32(kind, codes.reshape(-1, 32), scale.reshape(-1), None if offset is None else offset.reshape(-1))
    return blocks.view(np.uint8).reshape(len(codes), -1)


def _pack_32(kind: Kind, codes: NDArray[np.int8], scale: NDArray[Any], offset: NDArray[Any] | None) -> NDArray[np.void]:
    blocks = np.zeros(len(codes), kind.layout)
    blocks["d"] = scale
    if offset is not None:
        blocks["m"] = -offset
    if kind.name == "q8_0":
        blocks["qs"] = codes
        return blocks
    unsigned = (codes - np.int8(kind.low)).view(np.uint8)
    blocks["qs"] = unsigned[:, :16] & 15 | (unsigned[:, 16:] & 15) << 4
    if kind.name == "q5_0":
        blocks["qh"] = np.packbits(unsigned >> 4, axis=1, bitorder="little")
    return blocks


def _inverse(step: Floats) -> Floats:
    return np.divide(1, step, out=np.zeros_like(step), where=step != 0)


def _encode_32(kind: Kind, x: Floats) -> NDArray[np.void]:
    """As ggml's reference does it, bit for bit: codes come of the step before it is rounded to float16."""
    if kind.name == "q8_0":
        step = np.abs(x).max(axis=1) / np.float32(127)
        scaled = x * _inverse(step)[:, None]
        codes = np.trunc(scaled + np.copysign(np.float32(0.5), scaled))
        return _pack_32(kind, codes.astype(np.int8), step, None)
    if kind.symmetric:  # the number that is furthest from 0 becomes the lowest code
        furthest = np.take_along_axis(x, np.abs(x).argmax(axis=1)[:, None], axis=1)
        step = furthest / np.float32(kind.low)
        codes = np.trunc(x * _inverse(step) + np.float32(0.5 - kind.low)) + np.float32(kind.low)
        return _pack_32(kind, np.clip(codes, kind.low, kind.high).astype(np.int8), step[:, 0], None)
    low = x.min(axis=1, keepdims=True)
    step = (x.max(axis=1, keepdims=True) - low) / np.float32(kind.high)
    codes = np.clip(np.trunc((x - low) * _inverse(step) + np.float32(0.5)), 0, kind.high)
    return _pack_32(kind, codes.astype(np.int8), step[:, 0], -low[:, 0])


def _encode_k(kind: Kind, x: Floats) -> NDArray[np.void]:
    """Q4_K and Q5_K: steps and offsets of each 32 fitted, those put on 6 bits, then the codes that are nearest."""
    step, offset = _fit_offset(x.reshape(-1, 32), kind.high)
    step, offset = step.reshape(-1, 8), offset.reshape(-1, 8)
    d, m = (each.max(axis=1).astype(np.float16) for each in (step / 63, offset / 63))
    small = [
        np.clip(np.rint(each * _inverse(unit.astype(np.float32))[:, None]), 0, 63).astype(np.uint8)
        for each, unit in ((step, d), (offset, m))
    ]
    step = small[0].astype(np.float32) * d.astype(np.float32)[:, None]
    offset = small[1].astype(np.float32) * m.astype(np.float32)[:, None]
    grouped = x.reshape(-1, 8, 32) + offset[..., None]
    codes = np.clip(np.rint(grouped * _inverse(step)[..., None]), 0, kind.high).astype(np.uint8)
    blocks = np.zeros(len(x), kind.layout)
    blocks["d"], blocks["m"] = d, m
    low, high = ((each[:, :4], each[:, 4:]) for each in small)
    blocks["sm"] = np.concatenate(
        [low[0] | low[1] >> 4 << 6, high[0] | high[1] >> 4 << 6, low[1] & 15 | (high[1] & 15) << 4], axis=1
    )
    pairs = codes.reshape(-1, 4, 2, 32) & 15
    blocks["qs"] = (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(-1, 128)
    if kind.name == "q5_k":
        blocks["qh"] = np.packbits(codes >> 4, axis=1, bitorder="little")[:, 0]
    return blocks


def _fit_offset(x: Floats, top: int) -> tuple[Floats, Floats]:
    """Step and offset ≥ 0 of each row of x (n, 32): the best of some roundings, each solved by least squares.

    A weight counts as its size does in the row: |x| and the row's root mean square together.
    """
    weight = np.abs(x) + np.sqrt(np.square(x).mean(axis=1, keepdims=True))
    low = np.minimum(x.min(axis=1, keepdims=True), 0)
    span = x.max(axis=1, keepdims=True) - low
    total, first = weight.sum(axis=1), (weight * x).sum(axis=1)
    best = [span[:, 0] / top, -low[:, 0], np.full(len(x), np.inf, np.float32)]
    for attempt in range(_TRIES + 1):
        codes = np.clip(np.rint((x - low) * (_inverse(span) * np.float32(top - 1 + 0.1 * attempt))), 0, top)
        weighted = weight * codes
        ones, squares, products = weighted.sum(axis=1), (weighted * codes).sum(axis=1), (weighted * x).sum(axis=1)
        determinant = total * squares - ones * ones
        step = (total * products - ones * first) * _inverse(determinant)
        offset = (ones * products - squares * first) * _inverse(determinant)
        alone = offset < 0  # offsets are not below 0: the step alone, then
        step = np.where(alone, products * _inverse(squares), step)
        offset = np.where(alone, 0, offset)
        error = (weight * np.square(step[:, None] * codes - offset[:, None] - x)).sum(axis=1)
        better = (error < best[2]) & (step > 0)
        best = [np.where(better, new, old) for new, old in zip((step, offset, error), best, strict=True)]
    return best[0].astype(np.float32), best[1].astype(np.float32)


def _encode_q6_k(kind: Kind, x: Floats) -> NDArray[np.void]:
    """Steps of each 16 fitted, those put on 8 bits, then the codes that are nearest."""
    step = _fit_step(x.reshape(-1, 16), kind.low).reshape(-1, 16)
    furthest = np.take_along_axis(step, np.abs(step).argmax(axis=1)[:, None], axis=1)
    d = (furthest[:, 0] / np.float32(-128)).astype(np.float16)
    small = np.clip(np.rint(step * _inverse(d.astype(np.float32))[:, None]), -128, 127).astype(np.int8)
    actual = small.astype(np.float32) * d.astype(np.float32)[:, None]
    codes = np.clip(np.rint(x.reshape(-1, 16, 16) * _inverse(actual)[..., None]), kind.low, kind.high)
    unsigned = (codes - kind.low).astype(np.uint8).reshape(-1, 2, 4, 32)
    blocks = np.zeros(len(x), kind.layout)
    low, high = unsigned.reshape(-1, 2, 2, 64) & 15, unsigned >> 4
    blocks["ql"] = (low[:, :, 0] | low[:, :, 1] << 4).reshape(-1, 128)
    blocks["qh"] = (high << np.arange(0, 8, 2, dtype=np.uint8)[:, None]).sum(axis=2, dtype=np.uint8).reshape(-1, 64)
    blocks["s"], blocks["d"] = small, d
    return blocks


def _fit_step(x: Floats, low: int) -> Floats:
    """The step, of either sign, of each row of x: the best of some roundings, each solved by least squares."""
    weight = np.square(x)
    furthest = np.take_along_axis(x, np.abs(x).argmax(axis=1)[:, None], axis=1)
    best, gain = furthest[:, 0] / np.float32(low), np.full(len(x), -1, np.float32)
    for attempt in range(-_TRIES // 2 + 1, _TRIES // 2):
        codes = np.clip(np.rint(x * _inverse(furthest) * np.float32(low + 0.1 * attempt)), low, -low - 1)
        products, squares = (weight * x * codes).sum(axis=1), (weight * codes * codes).sum(axis=1)
        step = products * _inverse(squares)
        better = products * step > gain
        best, gain = np.where(better, step, best), np.where(better, products * step, gain)
    return best.astype(np.float32)
