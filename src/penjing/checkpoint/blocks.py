"""The order in which a checkpoint is worked through: what comes before the decoder, its layers one by one, the rest.

Only names are read (``….layers.7.…``, ``….h.7.…``), so that any decoder folder can be streamed, known or not.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

_LAYER = re.compile(r"^(?P<stack>.*?(?:^|\.)(?:layers|layer|h|blocks|block))\.(?P<index>\d+)\.")
_BEFORE = re.compile(r"embed|(?:^|\.)(?:wte|wpe)\.")


@dataclass(frozen=True)
class Block:
    """name: "before", "model.layers.7" or "after".  tensors: the names of its tensors, sorted."""

    name: str
    tensors: tuple[str, ...]

    @property
    def is_layer(self) -> bool:
        return self.name not in ("before", "after")


def layer_of(name: str) -> str | None:
    """The layer that a tensor belongs to, such as "model.layers.7", or None."""
    found = _LAYER.match(name)
    return f"{found['stack']}.{found['index']}" if found else None


def order_blocks(names: Iterable[str]) -> tuple[Block, ...]:
    """All tensors, in blocks: each layer of each stack is one, stacks by name, layers by number."""
    groups: dict[tuple[int, str, int], list[str]] = {}
    for name in sorted(names):
        found = _LAYER.match(name)
        if found:
            key = (1, found["stack"], int(found["index"]))
        else:
            key = (0, "before", 0) if _BEFORE.search(name) else (2, "after", 0)
        groups.setdefault(key, []).append(name)
    return tuple(
        Block(f"{stack}.{index}" if part == 1 else stack, tuple(tensors))
        for (part, stack, index), tensors in sorted(groups.items())
    )
