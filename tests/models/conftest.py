"""Tiny models with random weights, written by transformers, which is the oracle of the families."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from variants import SHAPE


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., tuple[Any, Path]]:
    """make(family, **config) → (transformers' model in float32, its folder)."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")

    def make(family: str, **changes: Any) -> tuple[Any, Path]:
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(family, **{**SHAPE, **changes})
        config._attn_implementation = "eager"
        model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
        randomize(model)
        model.save_pretrained(tmp_path / family)
        return model, tmp_path / family

    return make


def randomize(model: Any) -> None:
    """Everything that is stored: norms near one and biases away from zero, so that leaving one out shows."""
    import torch

    stored = set(model.state_dict())
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name in stored:
                tensor.normal_(1.0 if "norm" in name or "scal" in name else 0.0, 0.3)
