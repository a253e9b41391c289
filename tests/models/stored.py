"""Tiny models stored in another way than transformers writes them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from penjing.checkpoint.safetensors import read_safetensors, write_safetensors

Tensors = dict[str, np.ndarray]


def change(folder: Path, tensors: Callable[[Tensors], Tensors], **values: Any) -> Path:
    """A folder with its tensors and config.json changed."""
    stored, _ = read_safetensors(folder / "model.safetensors")
    write_safetensors(folder / "model.safetensors", tensors(stored), {"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def fused(tensors: Tensors) -> Tensors:
    """Experts one by one as tensors of all of them, as transformers holds them in memory."""
    made: Tensors = {}
    experts: dict[str, list[np.ndarray]] = {}
    for name, array in sorted(tensors.items()):
        found = re.match(r"(model\.layers\.\d+\.).*experts\.\d+\.(\w+)\.weight", name)
        if found is None:
            made[name] = array
        else:
            experts.setdefault(found[1] + found[2], []).append(array)
    for name, arrays in experts.items():
        prefix, part = name.rsplit(".", 1)
        if part in ("gate_proj", "w1"):
            up = np.stack(experts[f"{prefix}.{'up_proj' if part == 'gate_proj' else 'w3'}"])
            made[f"{prefix}.mlp.experts.gate_up_proj"] = np.concatenate([np.stack(arrays), up], axis=1)
        elif part in ("down_proj", "w2"):
            made[f"{prefix}.mlp.experts.down_proj"] = np.stack(arrays)
    return made
