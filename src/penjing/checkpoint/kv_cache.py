"""Steps for a server's cache of keys and values, as compressed-tensors stores them.

    X.k_scale, X.v_scale    (1,), for an attention X: what its keys, as the cache holds them, and values are divided by

config.json's ``kv_cache_scheme`` says what they become then. Penjing's engine has caches of its own, whose steps it
finds at run time, and leaves these alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import BadCheckpoint, PenjingError
from ..formats.affine import PER_TENSOR
from ..formats.floats import FloatGrid
from .floats import step_of
from .folder import Checkpoint

PARTS = {"keys": "k_scale", "values": "v_scale"}
# The word of recipes → what compressed-tensors says of it.
_SCHEMES = {"fp8": {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}}
_GRID = FloatGrid("fp8", PER_TENSOR)


def scheme(kind: str | None) -> dict[str, Any] | None:
    """config.json's ``kv_cache_scheme``; None where the cache stays as it is."""
    return None if kind is None else dict(_SCHEMES[kind])


def kind_of(config: Mapping[str, Any]) -> str | None:
    """What a config.json wants keys and values kept in, as recipes or compressed-tensors say it; None for nothing."""
    quantization = config.get("quantization_config")
    found = quantization.get("kv_cache_scheme") if isinstance(quantization, Mapping) else None
    if not isinstance(found, Mapping):
        return None
    known = (kind for kind, its in _SCHEMES.items() if all(found.get(key) == value for key, value in its.items()))
    return next(known, f"{found.get('type')}{found.get('num_bits')} by {found.get('strategy')}")


def steps(checkpoint: Checkpoint) -> tuple[str, ...]:
    """The names of tensors that are steps of the cache."""
    if kind_of(checkpoint.config) is None:
        return ()
    return tuple(name for name in checkpoint.infos if name.rpartition(".")[2] in PARTS.values())


def encode(
    largest: Mapping[str, float], sample: Mapping[str, NDArray[np.float32]], dtype: np.dtype[Any]
) -> tuple[dict[str, NDArray[Any]], dict[str, float]]:
    """The tensors of an attention, named without "X.", and what its cache loses by them.

    largest, sample: of its ``keys`` and ``values``.  dtype: of the steps. Told of either are ``largest_…`` and
    ``…_loss``, the squared error of the sample over its squares.
    """
    tensors: dict[str, NDArray[Any]] = {}
    verdict: dict[str, float] = {}
    for each, part in PARTS.items():
        tensors[part] = step_of(largest[each], dtype)
        numbers, step = sample[each], tensors[part].astype(np.float32)
        off = np.square(_GRID.nearest(numbers / step) * step - numbers).sum(dtype=np.float64)
        squares = np.square(numbers).sum(dtype=np.float64)
        verdict |= {f"largest_{each}": largest[each], f"{each}_loss": float(off / squares) if squares else 0.0}
    return tensors, verdict


def check(saved: Checkpoint, noted: Mapping[str, Any]) -> None:
    """PenjingError unless some attention was noted, and each has its two steps, which are positive numbers."""
    if not noted:
        raise PenjingError(f"{saved.path}: kv_cache: no layer put keys and values into its cache; leave kv_cache out")
    for name in (f"{module}.{part}" for module in noted for part in PARTS.values()):
        try:
            right = bool((saved.read(name) > 0).all()) and saved.infos[name].shape == (1,)
        except BadCheckpoint:
            right = False
        if not right:
            raise PenjingError(f"{saved.path}: self-check failed: {name} is no positive step; please report this")
