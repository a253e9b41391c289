"""Language models, by a description each: `ModelConfig`, which a family's file in ``families/`` reads from config.json.

`load` gives a whole model in memory for serving, `stream` one block at a time for models larger than memory.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from .. import kernels
from ..checkpoint import Checkpoint, open_checkpoint
from ..errors import BadInput
from .cache import weight_cache
from .config import ModelConfig
from .families import FAMILIES, read_family
from .model import Model
from .reader import read_object
from .step import Chunk, Result
from .streaming import Stream
from .weights import Activations, check_tensors

__all__ = [
    "FAMILIES",
    "Chunk",
    "Model",
    "ModelConfig",
    "Result",
    "Stream",
    "load",
    "read_config",
    "stream",
    "use_threads",
]


def read_config(checkpoint: Checkpoint) -> ModelConfig:
    """The model that a checkpoint's ``config.json`` (and ``generation_config.json``) describe.

    Raises Unsupported for a family that is not in `FAMILIES`, BadCheckpoint for values that cannot be.
    """
    values = dict(checkpoint.config)
    # What generation stops at is decided by generation_config.json where it says anything.
    if (ends := read_object(checkpoint.path / "generation_config.json").get("eos_token_id")) is not None:
        values["eos_token_id"] = ends
    return read_family(checkpoint, values)


def _open(model: str | Path | Checkpoint) -> Checkpoint:
    return model if isinstance(model, Checkpoint) else open_checkpoint(model)


def use_threads(count: int | None) -> None:
    """Let the kernels of this process use so many threads, or leave them as they are; BadInput for what cannot be."""
    if count is None:
        return
    try:
        kernels.set_threads(count)
    except ValueError as error:
        raise BadInput(str(error)) from None


def load(
    model: str | Path | Checkpoint,
    *,
    threads: int | None = None,
    activations: Activations = "auto",
    length: int | None = None,
    cache: bool = False,
) -> Model:
    """A whole model in memory.

    threads: for the kernels of this process; all cores by default.  activations: "auto" quantizes them on the fly to
    int8 where weights are integers, "float" only where config.json says so.  length: of the longest sequence, the
    model's own by default.  cache: keep the packed weights in a file, and take them from there; see docs/cache.md.
    """
    use_threads(threads)
    checkpoint = _open(model)
    config = read_config(checkpoint)
    check_tensors(checkpoint, config)
    with (weight_cache(checkpoint, activations) if cache else None) or contextlib.nullcontext() as kept:
        return Model(checkpoint, config, activations, length, kept)


def stream(model: str | Path | Checkpoint, *, activations: Activations = "auto") -> Stream:
    """A model whose blocks are in memory one at a time; ``activations`` as for `load`."""
    checkpoint = _open(model)
    config = read_config(checkpoint)
    check_tensors(checkpoint, config)
    return Stream(checkpoint, config, activations)
