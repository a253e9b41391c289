"""CIFAR ResNet-20 with its trained weights: answers, size, folding."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

import penjing
from penjing.modules.fold import FoldedBatchNorm

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("small_models", ROOT / "benchmarks" / "small_models.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("method", ["dynamic", "static"])
def test_int8_answers_like_float_in_a_quarter_of_the_bytes(bench: ModuleType, method: str, tmp_path: Path) -> None:
    model = bench.resnet20()
    x = torch.nn.functional.avg_pool2d(torch.randn(48, 3, 36, 36), 5, 1) * 4  # smooth, as images are
    quantized = copy.deepcopy(model)
    penjing.quantize(quantized, method, data=x[:16] if method == "static" else None)
    with torch.no_grad():
        before, after = model(x[16:]), quantized(x[16:])
    assert (after - before).norm() < 0.1 * before.norm()
    assert (after.argmax(1) == before.argmax(1)).float().mean() > 0.85
    assert sum(isinstance(part, FoldedBatchNorm) for part in quantized.modules()) == 19
    folder = penjing.save(quantized, tmp_path / "int8")
    size = sum(file.stat().st_size for file in folder.iterdir())
    original = penjing.save(model, tmp_path / "float") / "model.safetensors"
    assert size <= 0.27 * original.stat().st_size
    assert size <= 0.27 * bench.WEIGHTS.stat().st_size
    with torch.no_grad():
        assert torch.equal(penjing.load(folder, into=bench.ResNet20())(x), quantized(x))
