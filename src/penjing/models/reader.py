"""config.json, read strictly: what is missing, of the wrong type or contradictory is an error that names its key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..checkpoint.atomic import read_json
from ..errors import BadCheckpoint, Unsupported, nearest
from .config import Activation

_REQUIRED = object()
_MANY = 4096
_WIDEST_HEAD = 576
# What config.json calls an activation → ours.
_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}
FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"


class Reader:
    """The values of one config.json, and where they come from."""

    def __init__(self, values: Mapping[str, Any], where: str, defaults: Mapping[str, Any] | None = None) -> None:
        """defaults: what a family takes for keys that are missing; null is a value."""
        self.values = {**(defaults or {}), **values}
        self.where = where

    def error(self, key: str, right: str) -> BadCheckpoint:
        return BadCheckpoint(f"{self.where}: {key} = {self.values.get(key)!r}, expected {right}")

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is not None:
            return value
        if default is _REQUIRED:
            raise BadCheckpoint(f"{self.where}: {key} is missing")
        return default

    def integer(self, key: str, default: Any = _REQUIRED) -> int:
        value = self._get(key, default)
        if type(value) is not int or not 1 <= value < 2**31:
            raise self.error(key, "a positive integer")
        return value

    @property
    def layers(self) -> int:
        """``num_hidden_layers``, which must be a number that blocks can be described for one by one."""
        return self._few("num_hidden_layers")

    def experts(self, *keys: str) -> int:
        """A number of experts, under the first of the keys that is there."""
        return self._few(next((key for key in keys if self.values.get(key) is not None), keys[0]))

    def _few(self, key: str) -> int:
        if self.integer(key) > _MANY:
            raise self.error(key, f"1 to {_MANY}")
        return self.integer(key)

    def number(self, key: str, default: Any = _REQUIRED) -> float:
        value = self._get(key, default)
        if type(value) not in (int, float) or not 0 < value < float("inf"):
            raise self.error(key, "a positive number")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self._get(key, default)
        if type(value) is not bool:
            raise self.error(key, "true or false")
        return value

    def tokens(self, key: str) -> tuple[int, ...]:
        """One token id or a list of them; none if the key is missing or null."""
        value = self._get(key, [])
        ids = value if isinstance(value, list) else [value]
        if any(type(each) is not int or each < 0 for each in ids):
            raise self.error(key, "a token id or a list of them")
        return tuple(ids)

    def activation(self, key: str, default: str = "silu") -> Activation:
        value = self._get(key, default)
        if not isinstance(value, str) or value not in _ACTIVATIONS:
            raise Unsupported(f"{self.where}: {key} = {value!r}; {nearest(str(value), list(_ACTIVATIONS))}")
        return _ACTIVATIONS[value]

    def count(self, key: str, default: Any = _REQUIRED) -> int:
        """A whole number that may be 0."""
        value = self._get(key, default)
        if type(value) is not int or not 0 <= value < 2**31:
            raise self.error(key, "a whole number, 0 or more")
        return value

    def maybe(self, key: str) -> int | None:
        """A positive integer, or None if the key is missing or null."""
        return None if self.values.get(key) is None else self.integer(key)

    def factor(self, key: str) -> float:
        """A positive number, or 0 if the key is missing or null."""
        return 0.0 if self.values.get(key) is None else self.number(key)

    def refuse(self, key: str, *allowed: Any) -> None:
        """Unsupported where a key has a value that nothing here computes."""
        value = self.values.get(key)
        if value is not None and value not in allowed:
            raise Unsupported(f"{self.where}: {key} = {value!r} is not computed")

    def kinds(self, default: Sequence[str], allowed: Sequence[str] = (FULL, SLIDING)) -> tuple[str, ...]:
        """``layer_types``: what each block mixes positions with."""
        kinds = self._get("layer_types", list(default))
        if not isinstance(kinds, list) or len(kinds) != self.layers or any(kind not in allowed for kind in kinds):
            raise self.error("layer_types", f"{self.layers} times {' or '.join(map(repr, allowed))}")
        return tuple(kinds)

    def every(self, step: int, first: str = SLIDING, last: str = FULL) -> list[str]:
        """Kinds of blocks of which every ``step``-th is another."""
        return [first if (index + 1) % step else last for index in range(self.layers)]

    def heads(self) -> tuple[int, int, int]:
        """Heads, key-value heads and the size of a head."""
        hidden, heads = self.integer("hidden_size"), self.integer("num_attention_heads")
        groups = self.integer("num_key_value_heads", heads)
        if heads % groups:
            raise self.error("num_key_value_heads", f"a divisor of num_attention_heads = {heads}")
        if self.values.get("head_dim") is None and hidden % heads:
            raise self.error("num_attention_heads", f"a divisor of hidden_size = {hidden}, or head_dim given")
        size = self.integer("head_dim", hidden // heads)
        if size % 2:
            raise self.error("head_dim", "an even number, because rotary positions turn pairs")
        if size > _WIDEST_HEAD:
            raise Unsupported(f"{self.where}: head_dim = {size}; heads of up to {_WIDEST_HEAD} are computed")
        return heads, groups, size

    def causal(self) -> None:
        """Unsupported unless the architecture is a causal language model."""
        names = self.values.get("architectures") or []
        if not isinstance(names, list):
            raise self.error("architectures", "a list of names")
        right = ("ForCausalLM", "ForConditionalGeneration")
        if names and not any(str(name).endswith(right) for name in names):
            raise Unsupported(f"{self.where}: architectures = {names}; a causal language model (…ForCausalLM) is read")


def windows(kinds: Sequence[str], window: int | None) -> tuple[int | None, ...]:
    """The window of each block, from what its ``layer_types`` are."""
    return tuple(window if kind == SLIDING else None for kind in kinds)


def read_object(file: Path) -> dict[str, Any]:
    """A JSON object, empty if the file is not there; BadCheckpoint if it is something else."""
    values = read_json(file, BadCheckpoint) if file.exists() else {}
    if not isinstance(values, dict):
        raise BadCheckpoint(f"{file}: not an object")
    return values
