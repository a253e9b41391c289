"""What config.json says of a model of any family, for those that Penjing has no description of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import BadCheckpoint
from .reader import Reader

# The names under which families keep how long a text may be.
_LONGEST = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length", "n_ctx")
# Where nothing is said, because positions have no end (recurrent blocks, ALiBi): longer texts than most are read in.
UNBOUNDED = 1 << 15


@dataclass(frozen=True)
class Outline:
    """Of a model that transformers' graph computes: sizes in tokens; any of ``eos_token_ids`` ends a text."""

    family: str
    vocab_size: int
    max_position: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]


def read_outline(values: Mapping[str, Any], where: str) -> Outline:
    """``config.json`` as an `Outline`; BadCheckpoint for values that cannot be, named by ``where``."""
    family = values.get("model_type")
    if not isinstance(family, str):
        raise BadCheckpoint(f"{where}: model_type is missing; it names the family, e.g. 'llama'")
    read = Reader(values, where)
    bos = read.tokens("bos_token_id")
    longest = next((key for key in _LONGEST if values.get(key) is not None), "")
    return Outline(
        family=family,
        vocab_size=read.integer("vocab_size"),
        max_position=read.integer(longest, UNBOUNDED),
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=read.tokens("eos_token_id"),
    )
