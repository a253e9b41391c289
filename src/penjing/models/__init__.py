"""Language models, by a description each: `ModelConfig`, which a family's file in ``families/`` reads from config.json.

`load` gives a whole model in memory for serving, `stream` one block at a time for models larger than memory. A family
without a description runs as transformers' own graph (`foreign`), which `load_any` and `texts` turn to.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import kernels
from ..checkpoint import Checkpoint, open_checkpoint
from ..errors import BadInput, Unsupported
from .cache import weight_cache
from .config import ModelConfig
from .families import FAMILIES, is_described, read_family
from .model import Model
from .outline import Outline, read_outline
from .reader import read_object
from .step import Chunk, Result
from .streaming import Stream
from .weights import Activations, check_tensors

if TYPE_CHECKING:
    from .foreign.graph import Graph
    from .foreign.texts import GraphTexts

log = logging.getLogger("penjing.models")

__all__ = [
    "FAMILIES",
    "Chunk",
    "Model",
    "ModelConfig",
    "Outline",
    "Result",
    "Stream",
    "load",
    "load_any",
    "read_any",
    "read_config",
    "stream",
    "texts",
    "use_threads",
]


def read_config(checkpoint: Checkpoint) -> ModelConfig:
    """The model that a checkpoint's ``config.json`` (and ``generation_config.json``) describe.

    Raises Unsupported for a family that is not in `FAMILIES`, BadCheckpoint for values that cannot be.
    """
    return read_family(checkpoint, _values(checkpoint))


def _values(checkpoint: Checkpoint) -> dict[str, Any]:
    values = dict(checkpoint.config)
    # What generation stops at is decided by generation_config.json where it says anything.
    if (ends := read_object(checkpoint.path / "generation_config.json").get("eos_token_id")) is not None:
        values["eos_token_id"] = ends
    return values


def read_any(checkpoint: Checkpoint) -> ModelConfig | Outline:
    """`read_config`, or for a family without a description what is known of it all the same; imports no torch.

    Raises Unsupported where transformers, which computes such a family, is not installed.
    """
    values = _values(checkpoint)
    if is_described(values):
        return read_family(checkpoint, values)
    outline = read_outline(values, f"{checkpoint.path}/config.json")
    if missing := [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]:
        raise Unsupported(
            f"{checkpoint.path}: model_type = {outline.family!r} has no description here; transformers' graph would run"
            f" it, slower, but {' and '.join(missing)} {'are' if len(missing) > 1 else 'is'} not installed:"
            " pip install 'penjing[compress]'"
        )
    return outline


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
    screen: bool = False,
) -> Model:
    """A whole model in memory.

    threads: for the kernels of this process; all cores by default.  activations: "auto" quantizes them on the fly to
    int8 where weights are integers, "float" only where config.json says so.  length: of the longest sequence, the
    model's own by default.  cache: keep the packed weights in a file, and take them from there; see docs/cache.md.
    screen: keep a float head in 8 bits too, by which the likeliest token is found while half as much is read.
    """
    use_threads(threads)
    checkpoint = _open(model)
    config = read_config(checkpoint)
    check_tensors(checkpoint, config)
    with (weight_cache(checkpoint, activations, screen) if cache else None) or contextlib.nullcontext() as kept:
        return Model(checkpoint, config, activations, length, kept, screen)


def stream(model: str | Path | Checkpoint, *, activations: Activations = "auto") -> Stream:
    """A model whose blocks are in memory one at a time; ``activations`` as for `load`."""
    checkpoint = _open(model)
    config = read_config(checkpoint)
    check_tensors(checkpoint, config)
    return Stream(checkpoint, config, activations)


def load_any(
    model: str | Path | Checkpoint,
    *,
    threads: int | None = None,
    activations: Activations = "auto",
    length: int | None = None,
    cache: bool = False,
    screen: bool = False,
) -> Model | Graph:
    """`load`; for a family without a description transformers' graph, and a line in the log that says so."""
    checkpoint = _open(model)
    outline = read_any(checkpoint)
    if isinstance(outline, ModelConfig):
        return load(checkpoint, threads=threads, activations=activations, length=length, cache=cache, screen=screen)
    use_threads(threads)
    _say_slower(checkpoint, outline)
    from .foreign.graph import Graph

    return Graph(checkpoint, outline, activations, length)


def texts(model: str | Path | Checkpoint) -> Stream | GraphTexts:
    """`stream`; for a family without a description transformers' graph, whole in memory, and a line that says so."""
    checkpoint = _open(model)
    outline = read_any(checkpoint)
    if isinstance(outline, ModelConfig):
        return stream(checkpoint)
    _say_slower(checkpoint, outline)
    from .foreign.texts import GraphTexts

    return GraphTexts(checkpoint, outline)


def _say_slower(checkpoint: Checkpoint, outline: Outline) -> None:
    log.warning(
        "%s: model_type %r has no description: computed by transformers' graph with Penjing's kernels, slower",
        checkpoint.path,
        outline.family,
    )
