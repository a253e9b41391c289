"""Rotary positions: how fast each pair of a head's elements turns, and the ways to stretch that to long contexts.

Su et al., "RoFormer" (arXiv 2104.09864): pair i of a head at position p is turned by p · θ^(−2i/d). Halves of the head
make the pairs (element i with i + d/2), as Hugging Face stores weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import BadCheckpoint, Unsupported, nearest

# type → the keys it must have, besides those that every type may have.
_NEEDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}
_KNOWN = {
    *("rope_type", "type", "rope_theta", "factor", "low_freq_factor", "high_freq_factor"),
    *("original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"),
    *("mscale", "mscale_all_dim", "truncate", "partial_rotary_factor", "finetuned"),
}


@dataclass(frozen=True)
class Rope:
    """frequencies: radians a position of each pair, (head_dim / 2,).  scale: a factor on sine and cosine."""

    frequencies: tuple[float, ...]
    scale: float = 1.0

    def table(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Cosine and sine for positions (n,): two float32 arrays (n, 1, head_dim / 2), to broadcast over heads."""
        angles = positions[:, None, None].astype(np.float32) * np.asarray(self.frequencies, np.float32)
        scale = np.float32(self.scale)
        return np.cos(angles) * scale, np.sin(angles) * scale


def read_rope(config: Mapping[str, Any], where: str, head_dim: int, max_position: int) -> Rope:
    """From ``rope_parameters``, or the older ``rope_theta`` and ``rope_scaling``."""
    values = _merged(config, where)
    kind = values.get("rope_type", values.get("type", "default"))
    if kind not in _NEEDS:
        raise Unsupported(f"{where}: rope_type = {kind!r}; {nearest(str(kind), _NEEDS)}")
    for key in values:
        if key not in _KNOWN:
            raise BadCheckpoint(f"{where}: rotary positions have no {key!r}; {nearest(key, _KNOWN)}")
    for key in _NEEDS[kind]:
        _number(values, key, where, None)
    if values.get("partial_rotary_factor", 1) not in (None, 1):
        raise Unsupported(f"{where}: partial_rotary_factor = {values['partial_rotary_factor']}; whole heads are turned")
    theta = _number(values, "rope_theta", where, 10000.0)
    frequencies = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    original = _number(values, "original_max_position_embeddings", where, float(max_position))
    scale = 1.0
    if kind == "linear":
        frequencies = frequencies / values["factor"]
    elif kind == "llama3":
        frequencies = _llama3(frequencies, values, original)
    elif kind == "yarn":
        frequencies, scale = _yarn(frequencies, values, theta, head_dim, original, where)
    # "dynamic" stretches only beyond max_position, which no sequence here may pass.
    return Rope(tuple(frequencies.tolist()), scale)


def _merged(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    new, old = config.get("rope_parameters"), config.get("rope_scaling")
    for key, value in (("rope_parameters", new), ("rope_scaling", old)):
        if value is not None and not isinstance(value, dict):
            raise BadCheckpoint(f"{where}: {key} = {value!r}, expected an object")
    values: dict[str, Any] = {**(old or {}), **(new or {})}
    for key in ("rope_theta", "partial_rotary_factor"):
        outer = config.get(key)
        if outer is not None and values.setdefault(key, outer) != outer:
            raise BadCheckpoint(f"{where}: {key} = {outer} contradicts rope_parameters, which say {values[key]}")
    if new and old and any(new.get(key, value) != value for key, value in old.items()):
        raise BadCheckpoint(f"{where}: rope_parameters and rope_scaling contradict each other; keep one")
    return values


def _number(values: Mapping[str, Any], key: str, where: str, default: float | None) -> float:
    value: Any = default if values.get(key) is None else values[key]
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise BadCheckpoint(
            f"{where}: {key} of the rotary positions is {values.get(key)!r}, expected a positive number"
        )
    return float(value)


def _llama3(frequencies: NDArray[Any], values: Mapping[str, Any], original: float) -> NDArray[Any]:
    """Llama 3.1: slow pairs are slowed down by ``factor``, fast ones kept, those between interpolated."""
    turns = original * frequencies / (2 * math.pi)  # full turns within the original context
    low, high = values["low_freq_factor"], values["high_freq_factor"]
    keep = np.clip((turns - low) / (high - low), 0, 1)
    slowed: NDArray[Any] = frequencies * (keep + (1 - keep) / values["factor"])
    return slowed


def _yarn(
    frequencies: NDArray[Any], values: Mapping[str, Any], theta: float, head_dim: int, original: float, where: str
) -> tuple[NDArray[Any], float]:
    """YaRN (Peng et al., arXiv 2309.00071): as Llama 3, with a ramp over pair numbers and a temperature."""
    factor = values["factor"]

    def pair_turning(times: float) -> float:
        return head_dim * math.log(original / (times * 2 * math.pi)) / (2 * math.log(theta))

    low = pair_turning(_number(values, "beta_fast", where, 32.0))
    high = pair_turning(_number(values, "beta_slow", where, 1.0))
    if values.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = np.clip((np.arange(head_dim // 2) - low) / max(high - low, 0.001), 0, 1)
    scale = values.get("attention_factor")
    if scale is None:
        both = values.get("mscale") and values.get("mscale_all_dim")
        scale = (
            _mscale(factor, values["mscale"]) / _mscale(factor, values["mscale_all_dim"]) if both else _mscale(factor)
        )
    return frequencies * (1 - ramp) + frequencies / factor * ramp, float(scale)


def _mscale(factor: float, weight: float = 1.0) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def rotate(x: NDArray[np.float32], cos: NDArray[np.float32], sin: NDArray[np.float32]) -> NDArray[np.float32]:
    """Turn heads x (n, heads, head_dim) by the angles of `Rope.table`; a new array."""
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
