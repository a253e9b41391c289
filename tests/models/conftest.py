"""Tiny models with random weights, written by transformers, which is the oracle of the families."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 24,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


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
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                # Norms near one and biases away from zero, so that leaving one out shows.
                parameter.normal_(1.0 if "norm" in name else 0.0, 0.3)
        model.save_pretrained(tmp_path / family)
        return model, tmp_path / family

    return make
