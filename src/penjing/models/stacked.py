"""Experts that are stored in tensors of all of them, seen as the matrices that they are."""

from __future__ import annotations

from ..checkpoint import Checkpoint
from ..errors import Unsupported
from .config import Linear, Source
from .families import read_family
from .weights import check_tensors, locate


def unstack(checkpoint: Checkpoint) -> None:
    """Let each expert's matrices be tensors of the checkpoint, with the names that they have where they lie apart.

    So they are read, compressed and written one by one, as published checkpoints have them. Those of families that only
    have them together (gpt-oss, Gemma 4) stay as they are, as does everything of a model that is not described.
    Raises BadCheckpoint where config.json and the tensors contradict each other.
    """
    try:
        config = read_family(checkpoint, checkpoint.config)
    except Unsupported:
        return
    check_tensors(checkpoint, config)
    for index, block in enumerate(config.blocks):
        prefix, stacks = f"{config.block(index)}.", dict[str, dict[str, tuple[int, int, int]]]()
        for linear in block.linears:
            if linear.sources[0].expert is None and (source := locate(checkpoint, prefix, linear)).expert is not None:
                name = f"{prefix}{linear.name}.weight"
                stacks.setdefault(f"{prefix}{source.name}", {})[name] = _place(linear, source)
        for stack, parts in stacks.items():
            checkpoint.split(stack, parts)


def _place(linear: Linear, source: Source) -> tuple[int, int, int]:
    """Number of the expert, first row and rows; gate and up lie one after the other."""
    assert source.expert is not None
    return source.expert, source.rows[0].start if source.rows else 0, linear.shape[0]
