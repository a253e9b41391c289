"""Floats as their bits, which is how the native library takes them."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ..errors import Unsupported

_BITS = {
    np.dtype(np.float32): np.uint32,
    np.dtype(np.float16): np.uint16,
    np.dtype(ml_dtypes.bfloat16): np.uint16,
}


def is_bfloat16(array: NDArray[Any]) -> bool:
    return bool(array.dtype == ml_dtypes.bfloat16)


def float_bits(array: NDArray[Any]) -> NDArray[Any]:
    """A contiguous array of float32, float16 or bfloat16 as unsigned integers of its width."""
    if array.dtype not in _BITS:
        raise Unsupported(f"an array of {array.dtype}: the kernels take float32, float16 and bfloat16")
    return np.ascontiguousarray(array).view(_BITS[array.dtype])
