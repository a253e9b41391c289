"""ONNX export, with onnxruntime as the consumer."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nets import Residual, SimpleNet, assert_untouched, attribute_dump, settle
from torch import Tensor, nn

import penjing
from penjing.errors import BadInput, PenjingError, Unsupported
from penjing.kernels import isa
from penjing.modules import onnx as export

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")


def run(file: Path, *inputs: Tensor, as_written: bool = False) -> list[Any]:
    """The outputs, with the graph as it is in the file or as onnxruntime's optimizer rewrites it."""
    options, levels = onnxruntime.SessionOptions(), onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_DISABLE_ALL if as_written else levels.ORT_ENABLE_ALL
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    names = [item.name for item in session.get_inputs()]
    return session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})


def operators(file: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(file).graph.node)


def initializers(file: Path) -> dict[str, Any]:
    return {item.name: onnx.numpy_helper.to_array(item) for item in onnx.load(file).graph.initializer}


def numbers(shape: tuple[int, ...], seed: int) -> Tensor:
    """Inputs like the example's, that the export has not seen."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def float_size(tmp_path_factory: pytest.TempPathFactory) -> int:
    file = tmp_path_factory.mktemp("float") / "float.onnx"
    result = penjing.to_onnx(SimpleNet().eval(), torch.randn(2, 3, 32, 32), file)
    assert result.weights == dict.fromkeys(("int8", "uint8", "int4"), 0)
    assert result.difference is not None
    assert result.difference <= 1e-5 * result.largest
    assert file.stat().st_size == result.size_bytes
    return result.size_bytes


@pytest.mark.parametrize(
    ("settings", "pairs"),
    [
        ({"method": "static"}, 5),
        ({"method": "dynamic", "symmetric": False}, 5),
        ({"method": "static", "bits": 4, "group_size": 0, "symmetric": False}, 5),
        ({"method": "weight_only", "bits": 4, "group_size": -1}, 0),
    ],
    ids=str,
)
def test_simplenet(settings: dict[str, Any], pairs: int, float_size: int, tmp_path: Path) -> None:
    net, file = SimpleNet(), tmp_path / "net.onnx"
    x = numbers((3, 3, 32, 32), 1)
    penjing.quantize(net, data=numbers((8, 3, 32, 32), 2) if settings["method"] == "static" else None, **settings)
    result = penjing.to_onnx(net, x, file)

    kinds = operators(file)
    assert kinds["QuantizeLinear"] == pairs
    assert kinds["DequantizeLinear"] == 5 + pairs
    kind = "int4" if settings.get("bits") == 4 else "uint8" if settings["method"] == "static" else "int8"
    assert result.weights == {"int8": 0, "uint8": 0, "int4": 0, kind: 5}
    weights = [array for array in initializers(file).values() if array.ndim > 1]
    assert [str(array.dtype) for array in weights] == [kind] * 5
    assert result.size_bytes <= (0.2 if kind == "int4" else 0.3) * float_size
    assert result.difference is not None
    assert result.difference <= result.allowed <= 0.05 * result.largest
    # a batch of another length, and numbers that the export has not seen
    fresh = numbers((7, 3, 32, 32), 3)
    np.testing.assert_allclose(run(file, fresh)[0], net(fresh).numpy(), rtol=0, atol=2 * result.allowed)
    exact = np.abs(run(file, fresh, as_written=True)[0] - net(fresh).numpy()).max(1)
    assert np.median(exact) <= 1e-5 * result.largest  # no value on another code, in most samples
    assert str(tmp_path.parent) not in file.read_bytes().decode("latin1")


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(4, 6, 3, dilation=2, padding=2, padding_mode="reflect")
        self.two = nn.Conv2d(4, 6, 3, groups=2, padding="same", stride=1, bias=False)
        self.more = nn.Conv2d(6, 4, (3, 2), stride=2, padding=1, padding_mode="circular")
        self.edge = nn.Conv2d(4, 4, 3, padding=1, padding_mode="replicate", groups=4)
        self.three = nn.Conv3d(2, 3, (2, 1, 3), stride=(1, 2, 1), padding=1, padding_mode="zeros")

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        plane = self.edge(self.more(self.two(x)))
        return self.one(x[..., 0]), plane, self.three(x.unflatten(1, (2, 2)))


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "static"},
        {"method": "dynamic", "symmetric": False},
        {"method": "weight_only", "bits": 3, "group_size": 3, "symmetric": False},
    ],
    ids=str,
)
def test_convolutions(settings: dict[str, Any], tmp_path: Path) -> None:
    net, x = Convolutions(), numbers((3, 4, 9, 8), 1)
    penjing.quantize(net, data=numbers((8, 4, 9, 8), 2) if settings["method"] == "static" else None, **settings)
    result = penjing.to_onnx(net, x, tmp_path / "net.onnx")
    found = run(tmp_path / "net.onnx", x)
    for mine, theirs in zip(net(x), found, strict=True):
        np.testing.assert_allclose(theirs, mine.numpy(), rtol=0, atol=result.allowed)


@pytest.mark.parametrize(
    ("method", "shape", "symmetric"),
    [("static", (5, 3, 16), True), ("dynamic", (5, 3, 16), False)],
)
def test_one_linear_differs_by_whole_steps_or_not_at_all(
    method: str, shape: tuple[int, ...], symmetric: bool, tmp_path: Path
) -> None:
    layer, file = nn.Linear(16, 24), tmp_path / "linear.onnx"
    penjing.quantize(layer, method, symmetric=symmetric, data=[torch.randn(64, 16)] if method == "static" else None)
    penjing.to_onnx(layer, numbers(shape, 1), file)
    x = numbers((400, *shape[1:]), 2)
    expected = layer(x).numpy().reshape(-1, 24)
    difference = np.abs(run(file, x)[0].reshape(-1, 24) - expected)
    rows = x.reshape(-1, 16)
    reach = rows.amax(1).clamp(min=0) - rows.amin(1).clamp(max=0)
    step = (reach / 255).numpy()[:, None] if layer.coded.step is None else layer.coded.step
    assert np.all(difference <= 1.01 * step * np.abs(layer.weight.numpy()).max(1))  # one code at most
    flipped = np.any(difference > 1e-5 * np.abs(expected).max(), axis=1)
    assert flipped.mean() < 0.01  # almost all rows: none


@pytest.mark.parametrize(
    ("bits", "signed", "kind"),
    [
        (8, False, "uint8"),
        (7, False, "int8"),
        pytest.param(
            8, True, "int8", marks=pytest.mark.skipif("vnni" not in isa(), reason="sums of int8 saturate here")
        ),
    ],
)
def test_weights_that_may_saturate_are_unsigned_unless_asked(
    bits: int, signed: bool, kind: str, tmp_path: Path
) -> None:
    layer, x, file = nn.Linear(16, 24), numbers((4, 16), 1), tmp_path / "linear.onnx"
    penjing.quantize(layer, "static", bits=bits, data=[numbers((64, 16), 2)])
    assert penjing.to_onnx(layer, x, file, signed_weights=signed).weights[kind] == 1
    codes = next(array for array in initializers(file).values() if array.ndim == 2).astype(np.int32)
    codes -= 128 if kind == "uint8" else 0
    np.testing.assert_array_equal(np.sort(codes, None), np.sort(layer.weight_codes.numpy(), None))
    np.testing.assert_allclose(run(file, x, as_written=True)[0], layer(x).numpy(), atol=1e-5)


class Sequences(nn.Module):
    """Tied embedding and head, a recurrent layer and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 32)
        self.lstm = nn.LSTM(32, 32, batch_first=True)
        self.gru = nn.GRU(32, 32, batch_first=True)
        self.attention = nn.TransformerEncoderLayer(32, 2, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(32, 50)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.gru(self.lstm(self.embedding(tokens))[0])[0]
        return self.head(self.attention(x))


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "dynamic"},
        {"method": "weight_only", "bits": 4, "group_size": 16, "symmetric": False},
    ],
    ids=str,
)
def test_sequences(settings: dict[str, Any], tmp_path: Path) -> None:
    net, tokens = Sequences().eval(), torch.randint(0, 50, (3, 6))
    penjing.quantize(net, **settings)
    result = penjing.to_onnx(net, {"tokens": tokens}, tmp_path / "net.onnx")
    np.testing.assert_allclose(run(tmp_path / "net.onnx", tokens)[0], net(tokens).numpy(), atol=result.allowed, rtol=0)
    matrices = {name: array for name, array in initializers(tmp_path / "net.onnx").items() if array.size >= 1024}
    assert not [name for name, array in matrices.items() if array.dtype == np.float32]


def test_pruned_and_folded_module_is_left_as_it_was(tmp_path: Path) -> None:
    net = settle(Residual())
    penjing.prune(net, amount=0.75)
    penjing.quantize(net, bits=4)
    net.train()
    before, x = attribute_dump(net), numbers((1, 3, 12, 12), 1)
    penjing.to_onnx(net, x, tmp_path / "net.onnx")
    assert_untouched(net, before)
    assert net.training
    weight = initializers(tmp_path / "net.onnx")
    zeros = [np.mean(array.astype(np.int8) == 0) for array in weight.values() if str(array.dtype) == "int4"]
    assert min(zeros) >= 0.74
    again = copy.deepcopy(net).eval()
    np.testing.assert_allclose(run(tmp_path / "net.onnx", x)[0], again(x).numpy(), atol=0.02)


def test_fixed_batch_and_masks(tmp_path: Path) -> None:
    net, x = nn.Sequential(nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 4)), torch.randn(2, 12)
    penjing.prune(net)
    result = penjing.to_onnx(net, (x,), tmp_path / "net.onnx", dynamic_batch=False)
    assert "net.onnx" in str(result)
    assert "0_mask" not in "".join(initializers(tmp_path / "net.onnx"))
    assert hasattr(net[0], "weight_mask")
    with pytest.raises(Exception, match="Got invalid dimensions"):
        run(tmp_path / "net.onnx", torch.randn(3, 12))


def test_wrong_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x, file = nn.Linear(4, 4), torch.randn(2, 4), tmp_path / "net.onnx"
    for module, inputs, target, message in [
        ("net", x, file, "a str was given"),
        (layer, 3, file, "has no tensor"),
        (layer, x.bfloat16(), file, "is bfloat16"),
        (layer, torch.randn(2, 5), file, "does not take example_inputs"),
        (layer, x, tmp_path / "none" / "net.onnx", "in a folder that is there"),
        (layer, x, tmp_path, "in a folder that is there"),
    ]:
        with pytest.raises(BadInput, match=message):
            penjing.to_onnx(module, inputs, target)  # type: ignore[arg-type]
    with pytest.raises(Unsupported, match="torch cannot export Residual to ONNX"):
        penjing.to_onnx(settle(Residual(odd=True)), torch.randn(2, 3, 8, 8), file)
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Unsupported, match=r"pip install 'penjing\[onnx\]'"):
        penjing.to_onnx(layer, x, file)
    assert not list(tmp_path.iterdir())


def test_other_answers_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = SimpleNet(), numbers((3, 3, 32, 32), 1)
    penjing.quantize(net, "static", data=numbers((8, 3, 32, 32), 2))
    real = export.trace_codes

    def broken(root: nn.Module, signed: bool) -> None:
        real(root, signed)
        root.fc2.weight_scale *= 1.1

    monkeypatch.setattr(export, "trace_codes", broken)
    with pytest.raises(PenjingError, match="onnxruntime's answers differ"):
        penjing.to_onnx(net, x, tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())
