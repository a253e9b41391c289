"""Language models: one family a file, named as ``config.json`` names it in ``model_type``.

`load` gives a whole model in memory for serving, `stream` one block at a time for models larger than memory. To add
a family, write its file with a ``read(values, where) -> ModelConfig`` and put its name in `FAMILIES`.
"""

from __future__ import annotations

import importlib
from pathlib import Path

from .. import kernels
from ..checkpoint import Checkpoint, open_checkpoint
from ..errors import BadCheckpoint, BadInput, Unsupported, nearest
from .config import ModelConfig
from .model import Chunk, KVCache, Model
from .reader import read_object
from .streaming import Stream
from .weights import check_tensors

__all__ = [
    "FAMILIES",
    "Chunk",
    "KVCache",
    "Model",
    "ModelConfig",
    "Stream",
    "load",
    "read_config",
    "stream",
    "use_threads",
]

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


def read_config(checkpoint: Checkpoint) -> ModelConfig:
    """The model that a checkpoint's ``config.json`` (and ``generation_config.json``) describe.

    Raises Unsupported for a family that is not in `FAMILIES`, BadCheckpoint for values that cannot be.
    """
    where = f"{checkpoint.path}/config.json"
    family = checkpoint.config.get("model_type")
    if not isinstance(family, str):
        raise BadCheckpoint(f"{where}: model_type is missing; it names the family, e.g. 'llama'")
    if family not in FAMILIES:
        raise Unsupported(
            f"{where}: model_type = {family!r} is not a family that Penjing computes; {nearest(family, FAMILIES)}"
        )
    values = dict(checkpoint.config)
    # What generation stops at is decided by generation_config.json where it says anything.
    if (ends := read_object(checkpoint.path / "generation_config.json").get("eos_token_id")) is not None:
        values["eos_token_id"] = ends
    config: ModelConfig = importlib.import_module(f".{family}", __name__).read(values, where)
    return config


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


def load(model: str | Path | Checkpoint, *, threads: int | None = None) -> Model:
    """A whole model in memory. ``threads``: for the kernels of this process; all cores by default."""
    use_threads(threads)
    checkpoint = _open(model)
    config = read_config(checkpoint)
    check_tensors(checkpoint, config)
    return Model(checkpoint, config)


def stream(model: str | Path | Checkpoint) -> Stream:
    """A model whose blocks are in memory one at a time."""
    checkpoint = _open(model)
    config = read_config(checkpoint)
    check_tensors(checkpoint, config)
    return Stream(checkpoint, config)
