"""Rotary positions: how fast each pair of a head's elements turns, and the ways to stretch that to long contexts.

Su et al., "RoFormer" (arXiv 2104.09864): pair i of a head at position p is turned by p · θ^(−2i/d). Halves of the head
make the pairs (element i with i + d/2), as Hugging Face stores most weights, or neighbours (2i with 2i + 1).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import BadCheckpoint, Unsupported, nearest

FULL = "full_attention"  # the kind of layer, as ``layer_types`` calls it, that scalings are of
# type → the keys it must have, besides those that every type may have.
_NEEDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "proportional": (),
}
_MOST = 1e15  # no number of rotary positions is larger
_LISTS = ("short_factor", "long_factor")
_OLDER = {"su": "longrope"}
_KNOWN = {
    *("rope_type", "type", "rope_theta", "factor", "low_freq_factor", "high_freq_factor"),
    *("original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"),
    *("mscale", "mscale_all_dim", "truncate", "partial_rotary_factor", "finetuned", "short_factor", "long_factor"),
    # Of positions in pictures, which texts do not have; of scores, which families read themselves.
    *("mrope_section", "mrope_interleaved", "llama_4_scaling_beta", "max_position_embeddings"),
}


@dataclass(frozen=True)
class Rope:
    """frequencies: radians a position of each pair; 2 · pairs elements of a head turn.  scale: on sine and cosine.

    long: the frequencies of sequences that may grow beyond ``original`` tokens, if those are others (LongRoPE).
    """

    frequencies: tuple[float, ...]
    scale: float = 1.0
    long: tuple[float, ...] | None = None
    original: int = 0

    def for_length(self, length: int) -> Rope:
        """The positions of sequences of up to ``length`` tokens: with one set of frequencies."""
        if self.long is None:
            return self
        return replace(self, frequencies=self.long if length > self.original else self.frequencies, long=None)

    def table(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Cosine and sine for positions (n,): two float32 arrays (n, 1, pairs), to broadcast over heads."""
        angles = positions[:, None, None].astype(np.float32) * np.asarray(self.frequencies, np.float32)
        scale = np.float32(self.scale)
        return np.cos(angles) * scale, np.sin(angles) * scale


def read_rope(config: Mapping[str, Any], where: str, head_dim: int, **defaults: Any) -> Rope:
    """From ``rope_parameters``, or the older ``rope_theta`` and ``rope_scaling``.

    defaults: what a family takes for ``rope_theta`` and ``partial_rotary_factor`` where config.json says nothing.
    """
    return rope_from(merged(config, where), config, where, head_dim, **defaults)


def read_rope_of(
    kind: str, config: Mapping[str, Any], where: str, head_dim: int, local: str = "rope_theta", **defaults: Any
) -> Rope:
    """Of one kind of layer, where ``rope_parameters`` has an object for each; or from the older names, whose scaling
    is of full attention, and in which ``local`` is the base of the other kind."""
    given = config.get("rope_parameters")
    if isinstance(given, dict) and isinstance(given.get(kind), dict):
        return rope_from(given[kind], config, where, head_dim, **defaults)
    if kind == FULL:
        return read_rope(config, where, head_dim, **defaults)
    base = config.get(local)
    return rope_from({} if base is None else {"rope_theta": base}, config, where, head_dim, **defaults)


def rope_from(given: Mapping[str, Any], config: Mapping[str, Any], where: str, head_dim: int, **defaults: Any) -> Rope:
    """From one object of parameters, such as those of one kind of layer."""
    values = {**defaults, **{key: value for key, value in given.items() if value is not None}}
    kind = str(values.get("rope_type", values.get("type", "default")))
    kind = _OLDER.get(kind, kind)
    if kind not in _NEEDS:
        raise Unsupported(f"{where}: rope_type = {kind!r}; {nearest(kind, _NEEDS)}")
    for key in values:
        if key not in _KNOWN:
            raise BadCheckpoint(f"{where}: rotary positions have no {key!r}; {nearest(key, _KNOWN)}")
    for key in _NEEDS[kind]:
        if key not in _LISTS:
            _number(values, key, where, None)
    part = _number(values, "partial_rotary_factor", where, 1.0)
    width = head_dim if kind == "proportional" else int(head_dim * part)
    if part > 1 or width < 2 or width % 2:
        raise BadCheckpoint(f"{where}: partial_rotary_factor = {part} of head_dim = {head_dim}, expected whole pairs")
    theta = _number(values, "rope_theta", where, 10000.0, above=1)
    frequencies = theta ** -(np.arange(0, width, 2) / width)
    return _stretched(kind, frequencies, theta, part, values, config, where)


def _stretched(
    kind: str,
    frequencies: NDArray[Any],
    theta: float,
    part: float,
    values: Mapping[str, Any],
    config: Mapping[str, Any],
    where: str,
) -> Rope:
    longest = _number(config, "max_position_embeddings", where, 2.0)
    original = _number(values, "original_max_position_embeddings", where, longest)
    scale = 1.0
    if kind == "longrope":
        return _longrope(frequencies, values, config, longest, where)
    if kind == "linear":
        frequencies = frequencies / values["factor"]
    elif kind == "proportional":
        # Only the fastest pairs of the head turn, as fast as if all did.
        turning = int(part * len(frequencies) * 2 // 2)
        frequencies = np.where(np.arange(len(frequencies)) < turning, frequencies, 0)
        frequencies = frequencies / _number(values, "factor", where, 1.0)
    elif kind == "llama3":
        frequencies = _llama3(frequencies, values, original, where)
    elif kind == "yarn":
        frequencies, scale = _yarn(frequencies, values, theta, original, where)
    # "dynamic" stretches only beyond max_position, which no sequence here may pass.
    return Rope(tuple(frequencies.tolist()), scale)


def merged(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The rotary settings of a config.json, whichever of the two ways it says them in."""
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


def _number(values: Mapping[str, Any], key: str, where: str, default: float | None, above: float = 0) -> float:
    value: Any = default if values.get(key) is None else values[key]
    if type(value) not in (int, float) or not above < value < _MOST:
        raise BadCheckpoint(
            f"{where}: {key} of the rotary positions is {values.get(key)!r}, expected a number above {above}"
        )
    return float(value)


def _llama3(frequencies: NDArray[Any], values: Mapping[str, Any], original: float, where: str) -> NDArray[Any]:
    """Llama 3.1: slow pairs are slowed down by ``factor``, fast ones kept, those between interpolated."""
    turns = original * frequencies / (2 * math.pi)  # full turns within the original context
    low = _number(values, "low_freq_factor", where, None)
    high = _number(values, "high_freq_factor", where, None, above=low)
    keep = np.clip((turns - low) / (high - low), 0, 1)
    slowed: NDArray[Any] = frequencies * (keep + (1 - keep) / values["factor"])
    return slowed


def _yarn(
    frequencies: NDArray[Any], values: Mapping[str, Any], theta: float, original: float, where: str
) -> tuple[NDArray[Any], float]:
    """YaRN (Peng et al., arXiv 2309.00071): as Llama 3, with a ramp over pair numbers and a temperature."""
    factor, width = values["factor"], 2 * len(frequencies)

    def pair_turning(times: float) -> float:
        return width * math.log(original / (times * 2 * math.pi)) / (2 * math.log(theta))

    low = pair_turning(_number(values, "beta_fast", where, 32.0))
    high = pair_turning(_number(values, "beta_slow", where, 1.0))
    if values.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    ramp = np.clip((np.arange(width // 2) - low) / max(high - low, 0.001), 0, 1)
    scale = _mscale(factor)
    if values.get("mscale") and values.get("mscale_all_dim"):
        turning, every = (_number(values, key, where, None) for key in ("mscale", "mscale_all_dim"))
        scale = _mscale(factor, turning) / _mscale(factor, every)
    scale = _number(values, "attention_factor", where, scale)
    return frequencies * (1 - ramp) + frequencies / factor * ramp, scale


def _mscale(factor: float, weight: float = 1.0) -> float:
    """YaRN's temperature."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def score_temperature(config: Mapping[str, Any], where: str) -> float:
    """What YaRN with ``mscale_all_dim`` multiplies all scores with, and not only those of what turns (DeepSeek)."""
    values = merged(config, where)
    if not values.get("mscale_all_dim"):
        return 1.0
    factor = _number(values, "factor", where, None)
    return _mscale(factor, _number(values, "mscale_all_dim", where, None)) ** 2


def _longrope(
    frequencies: NDArray[Any], values: Mapping[str, Any], config: Mapping[str, Any], longest: float, where: str
) -> Rope:
    """LongRoPE (Ding et al., arXiv 2402.13753): a searched factor for each pair, one set for short, one for long."""
    sets = []
    for key in _LISTS:
        factors: Any = values.get(key)
        right = isinstance(factors, list) and len(factors) == len(frequencies)
        if not right or any(type(each) not in (int, float) or each <= 0 for each in factors):
            raise BadCheckpoint(f"{where}: {key} of the rotary positions: expected {len(frequencies)} positive numbers")
        sets.append(tuple((frequencies / np.asarray(factors, np.float64)).tolist()))
    beside = config.get("original_max_position_embeddings") is not None  # Phi-3 has it there, and it goes first
    original = _number(config if beside else values, "original_max_position_embeddings", where, longest, above=1)
    factor = _number(values, "factor", where, longest / original)
    scale = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return Rope(sets[0], _number(values, "attention_factor", where, scale), sets[1], int(original))


def rotate(
    x: NDArray[np.float32], cos: NDArray[np.float32], sin: NDArray[np.float32], interleaved: bool = False
) -> NDArray[np.float32]:
    """Turn heads x (n, heads, head_dim) by the angles of `Rope.table`, the rest of the head as it is; a new array."""
    turned = x.copy()
    width = 2 * cos.shape[-1]
    own = (slice(0, width, 2), slice(1, width, 2)) if interleaved else (slice(width // 2), slice(width // 2, width))
    first, second = x[..., own[0]], x[..., own[1]]
    turned[..., own[0]] = first * cos - second * sin
    turned[..., own[1]] = second * cos + first * sin
    return turned
