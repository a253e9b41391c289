"""transformers' modules as they are before there are weights: built without memory, and without advice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from ...checkpoint import Checkpoint
from ...errors import Unsupported


def build_empty(checkpoint: Checkpoint, build: Callable[[], Any]) -> Any:
    """What ``build`` makes, its parameters without memory, its buffers computed.

    Raises Unsupported with the reason when a family's own code refuses what config.json says.
    """
    try:
        with _parameters_without_memory(), torch.no_grad():
            return build()
    except Exception as error:  # whatever a family's own code says to values that it does not expect
        reason = " ".join(str(error).split())[:200]
        family = checkpoint.config.get("model_type")
        raise Unsupported(
            f"{checkpoint.path}: model_type = {family!r}: transformers cannot build it: {reason}"
        ) from None


@contextmanager
def quietly() -> Iterator[None]:
    """Without transformers' progress bars and advice, which is about how to make transformers faster."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def _parameters_without_memory() -> Iterator[None]:
    """Within it, every parameter that a module registers goes to the meta device; buffers stay real."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
