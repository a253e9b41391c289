"""Every family compressed: Penjing's computation, against transformers with the numbers that the integers stand for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from stored import change, fused
from variants import VARIANTS

import penjing
from penjing import models
from penjing.checkpoint import open_checkpoint
from penjing.checkpoint.describe import describe
from penjing.models.reference import Reference

RECIPES: dict[str, dict[str, Any]] = {
    "int8": {"bits": 8, "group_size": 2},
    "int4": {"bits": 4, "group_size": 2, "symmetric": False},
}
# One variant of each family, and of each way in which weights are stored.
CHOSEN = {family: name for name, (family, changes) in reversed(VARIANTS.items())}
TOKENS = np.random.default_rng(11).integers(0, 97, 23)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", CHOSEN)
def test_compressed_families_compute_what_their_integers_stand_for(
    family: str, recipe: str, tiny: Any, tmp_path: Any
) -> None:
    import torch

    oracle, folder = tiny(family, **VARIANTS[CHOSEN[family]][1])
    result = penjing.compress(folder, tmp_path / "small", check="full", **RECIPES[recipe])
    assert "agree with the plain computation" in result.check["verdict"]
    saved = open_checkpoint(tmp_path / "small")
    loose = {name: torch.tensor(saved.tensor(name).astype(np.float32)) for name in saved.names}
    plain = with_weights(folder, loose)
    oracle = type(oracle).from_pretrained(plain, attn_implementation="eager").float().eval()
    with torch.no_grad():
        right = oracle(torch.tensor(TOKENS[None])).logits[0].numpy()
    logits = Reference(saved, models.read_config(saved)).logits(TOKENS)
    np.testing.assert_allclose(logits, right, atol=5e-4, rtol=2e-4)


def test_experts_in_one_tensor_are_compressed_one_by_one(tiny: Any, tmp_path: Any) -> None:
    family, changes = VARIANTS["qwen2_moe"]
    _, folder = tiny(family, **changes)
    apart = penjing.compress(folder, tmp_path / "apart", "int4", group_size=4)
    change(folder, fused)
    together = penjing.compress(folder, tmp_path / "together", "int4", group_size=4)
    assert together.digest == apart.digest
    assert together.stacked_bytes == 0


def test_experts_that_only_lie_together_stay_as_they_are_and_it_is_said(tiny: Any, tmp_path: Any) -> None:
    family, changes = VARIANTS["gpt_oss"]
    _, folder = tiny(family, **changes)
    result = penjing.compress(folder, tmp_path / "small", "int4", group_size=4)
    assert result.stacked_bytes == 3 * 5 * 3 * 24 * 44 * 4
    assert f"{result.stacked_bytes:,} bytes of experts" in str(result)
    summary = describe(tmp_path / "small")
    assert summary.roles["experts"]["parameters"] == 3 * 5 * (3 * 24 * 44 + 24 + 88)
    assert summary.roles["routers"]["parameters"] == 3 * 5 * 25
    assert summary.parameters == models.read_config(open_checkpoint(tmp_path / "small")).parameters


def with_weights(folder: Any, tensors: dict[str, Any]) -> Any:
    """The model's folder with these weights in place of its own."""
    from safetensors.torch import save_file

    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder
