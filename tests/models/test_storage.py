"""One model, stored in the ways that checkpoints are: it computes the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stored import Tensors, change, fused
from variants import VARIANTS

import penjing
from penjing import models
from penjing.checkpoint import open_checkpoint
from penjing.checkpoint.describe import describe
from penjing.errors import BadCheckpoint, Unsupported
from penjing.formats import mxfp4
from penjing.models.config import Linear, Run, Source
from penjing.models.reference import Reference
from penjing.models.weights import check_tensors, read_bias, read_weight

RNG = np.random.default_rng(3)
IDS = RNG.integers(0, 97, 20)


def logits(folder: Path) -> np.ndarray:
    checkpoint = open_checkpoint(folder)
    config = models.read_config(checkpoint)
    check_tensors(checkpoint, config)
    return Reference(checkpoint, config).logits(IDS)


@pytest.mark.parametrize("variant", ["mixtral", "qwen2_moe", "deepseek_v3"])
def test_experts_in_tensors_of_all_of_them(variant: str, tiny: Any) -> None:
    family, changes = VARIANTS[variant]
    _, folder = tiny(family, **changes)
    right = logits(folder)
    change(folder, fused)
    assert any(name.endswith("experts.gate_up_proj") for name in open_checkpoint(folder).infos)
    np.testing.assert_array_equal(logits(folder), right)


def test_experts_of_gpt_oss_in_mxfp4(tiny: Any) -> None:
    """The published form: four-bit blocks along the inputs, against transformers with the numbers they stand for."""
    import torch
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    shape = {"hidden_size": 64, "intermediate_size": 96, "num_local_experts": 3, "num_experts_per_tok": 2}
    family, changes = VARIANTS["gpt_oss"]
    oracle, folder = tiny(family, **{**changes, **shape})
    packed: Tensors = {}
    for name, parameter in oracle.named_parameters():
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, columns, rows = parameter.shape
            blocks = RNG.integers(0, 256, (experts, rows, columns // 32, 16), np.uint8)
            scales = RNG.integers(124, 127, (experts, rows, columns // 32), np.uint8)
            packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            with torch.no_grad():
                values = convert_moe_packed_tensors(torch.tensor(blocks), torch.tensor(scales), dtype=torch.float32)
                parameter.copy_(values)
                np.testing.assert_array_equal(
                    mxfp4.decode(blocks, scales).astype(np.float32), values.transpose(1, 2).numpy()
                )
            del parameter
    names = [name.removesuffix("_blocks") for name in packed]
    change(
        folder,
        lambda tensors: {name: array for name, array in tensors.items() if name not in names} | packed,
        quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
    )
    with torch.no_grad():
        right = oracle(torch.tensor(IDS[None])).logits[0].numpy()
    np.testing.assert_allclose(logits(folder), right, atol=2e-4, rtol=1e-4)
    summary = describe(folder)
    assert summary.format == "float32, mxfp4"
    assert summary.parameters == sum(parameter.numel() for parameter in oracle.parameters())
    with pytest.raises(Unsupported, match="compressed already"):
        penjing.compress(folder, folder / "small", "int4")


TOWERS = {
    "gemma3": ("gemma3", ["model.language_model.", "language_model.model."]),
    "mistral-window": ("mistral3", ["model.language_model.", "language_model.model."]),
    "ministral3": ("mistral3", ["model.language_model."]),
    "qwen3_5": ("qwen3_5", ["model.language_model."]),
    "qwen3_5_moe": ("qwen3_5_moe", ["model.language_model."]),
    "gemma4": ("gemma4", ["model.language_model."]),
}


@pytest.mark.parametrize("variant", TOWERS)
def test_the_text_of_models_that_see(variant: str, tiny: Any) -> None:
    """``text_config`` is read, and names begin as they do beside a tower for pictures."""
    family, changes = VARIANTS[variant]
    outer, stems = TOWERS[variant]
    _, folder = tiny(family, **changes)
    right = logits(folder)
    text = json.loads((folder / "config.json").read_text())
    (folder / "generation_config.json").unlink()
    for key in set(text):
        text.setdefault(key, None)
    tied = text.pop("tie_word_embeddings", None)
    before = "model."
    for stem in stems:
        head = "language_model.lm_head" if stem.startswith("language") else "lm_head"

        def renamed(tensors: Tensors, before: str = before, stem: str = stem, head: str = head) -> Tensors:
            return {
                f"{head}.weight" if "lm_head" in name else name.replace(before, stem, 1): array
                for name, array in tensors.items()
            }

        change(folder, renamed)
        config = {"model_type": outer, "architectures": ["XForConditionalGeneration"], "text_config": text}
        (folder / "config.json").write_text(json.dumps(config | {"vision_config": {}}))
        np.testing.assert_array_equal(logits(folder), right)
        described = models.read_config(open_checkpoint(folder))
        assert (described.stem, described.eos_token_ids, described.tied_embeddings) == (stem, (2,), bool(tied))
        before = stem


class Stored:
    """What `read_weight` asks of a checkpoint, for one module."""

    path = Path("here")

    def __init__(self, **tensors: np.ndarray) -> None:
        self.tensors = {name.replace("__", "."): array for name, array in tensors.items()}
        self.infos = self.tensors

    def is_compressed(self, module: str) -> bool:
        return False

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        return self.tensors[name][rows or slice(None)]

    def tensor(self, name: str) -> np.ndarray:
        return self.tensors[name]

    def weight(self, module: str) -> np.ndarray:
        return self.tensors[f"{module}.weight"]


def test_rows_of_a_fused_matrix_by_brute_force() -> None:
    matrix, bias = RNG.normal(size=(12, 5)), RNG.normal(size=12)
    stored: Any = Stored(b__qkv__weight=matrix, b__qkv__bias=bias)
    runs = (Run(1, 2, 6, 2), Run(4, 1))
    linear = Linear("q", "", "", (5, 5), True, (Source("qkv", runs, 12),))
    chosen = [1, 2, 7, 8, 4]
    np.testing.assert_array_equal(read_weight(stored, "b.", linear), matrix[chosen])
    np.testing.assert_array_equal(read_bias(stored, "b.", linear), bias[chosen].astype(np.float32))


def test_wrong_storage_is_refused_by_name(tiny: Any) -> None:
    family, changes = VARIANTS["mixtral"]
    _, folder = tiny(family, **changes)
    change(folder, lambda tensors: {n: a for n, a in tensors.items() if "layers.1.block_sparse_moe.experts.3" not in n})
    with pytest.raises(BadCheckpoint, match=r"layers\.1\.block_sparse_moe\.experts\.3\.w1\.weight is missing"):
        logits(folder)
    _, folder = tiny("phi3")
    change(folder, lambda tensors: {n: a[:-1] if "qkv" in n else a for n, a in tensors.items()})
    with pytest.raises(BadCheckpoint, match=r"qkv_proj\.weight has shape \(47, 24\), config.json calls for \(48, 24\)"):
        logits(folder)
    _, folder = tiny("gpt_oss", num_local_experts=4, num_experts_per_tok=2, head_dim=8)
    change(folder, lambda tensors: {n: a[:3] if n.endswith("down_proj") else a for n, a in tensors.items()})
    with pytest.raises(BadCheckpoint, match=r"experts\.down_proj has shape \(3, 44, 24\)"):
        logits(folder)
