"""Saved and loaded: the same numbers, the promised sizes, damaged files refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from nets import Residual, SimpleNet, settle
from safetensors.torch import load_file
from torch import nn

import penjing
from penjing.errors import BadCheckpoint, BadInput


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def answers(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        output = net.eval()(x)
    return output[0] if isinstance(output, tuple) else output


STEPS = {
    "plain": [],
    "int8": [("quantize", {})],
    "static": [("quantize", {"method": "static", "data": torch.rand(4, 3, 32, 32)})],
    "int4 groups": [("quantize", {"method": "weight_only", "bits": 4, "group_size": 2, "ignore": ("conv1",)})],
    "int3 affine": [("quantize", {"bits": 3, "symmetric": False})],
    "int2 a tensor": [("quantize", {"bits": 2, "group_size": 0})],
    "pruned": [("prune", {})],
    "pruned int8": [("prune", {"amount": 0.6}), ("quantize", {})],
    "pruned int4 affine": [("prune", {"amount": 0.6}), ("quantize", {"bits": 4, "symmetric": False})],
    "pruned int4 groups": [
        ("prune", {"amount": 0.7}),
        ("quantize", {"method": "weight_only", "bits": 4, "group_size": 4, "symmetric": False, "ignore": ("conv*",)}),
    ],
    "cut": [("prune", {"pattern": "channel", "example_inputs": torch.rand(1, 3, 32, 32)})],
    "cut, pruned, int8": [
        ("prune", {"pattern": "channel", "example_inputs": torch.rand(1, 3, 32, 32)}),
        ("prune", {"amount": 0.6}),
        ("quantize", {}),
    ],
}


@pytest.mark.parametrize("into", [True, False])
@pytest.mark.parametrize("case", STEPS)
def test_the_same_numbers_come_back(case: str, into: bool, tmp_path: Path) -> None:
    net, x = SimpleNet(), torch.rand(2, 3, 32, 32)
    for verb, settings in STEPS[case]:
        result = getattr(penjing, verb)(net, **settings)
    penjing.save(net, tmp_path / "saved")
    again = penjing.load(tmp_path / "saved", into=SimpleNet() if into else None)
    assert torch.equal(answers(again, x), answers(net, x))
    assert again.state_dict().keys() == net.state_dict().keys()
    for name, tensor in net.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
    if STEPS[case]:
        stored = (tmp_path / "saved" / "model.safetensors").stat().st_size
        assert 0 < stored - result.bytes_after < 2000  # the header


@pytest.mark.parametrize("odd", [True, False])
def test_folded_batch_norms_come_back(odd: bool, tmp_path: Path) -> None:
    net, x = settle(Residual(odd)), torch.rand(2, 3, 8, 8)
    penjing.quantize(net)
    penjing.save(net, tmp_path / "saved")
    assert torch.equal(answers(penjing.load(tmp_path / "saved"), x), answers(net, x))
    assert torch.equal(answers(penjing.load(tmp_path / "saved", into=Residual(odd)), x), answers(net, x))


OTHERS = [
    (lambda: nn.Sequential(nn.Embedding(9, 8), nn.LSTM(8, 6, num_layers=2)), torch.randint(0, 9, (4, 2))),
    (lambda: nn.Sequential(nn.Embedding(9, 8, padding_idx=0), nn.GRU(8, 6)), torch.randint(0, 9, (4, 2))),
    (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), torch.rand(2, 3, 8)),
    (lambda: nn.Sequential(nn.ModuleDict({"a": nn.Linear(3, 2)})["a"], nn.GELU(approximate="tanh")), torch.rand(1, 3)),
    (lambda: nn.Conv2d(4, 6, (3, 1), stride=2, padding="valid", groups=2, bias=False), torch.rand(1, 4, 8, 8)),
]


@pytest.mark.parametrize("verbs", [["quantize"], ["prune"], ["prune", "quantize"]])
@pytest.mark.parametrize(("make", "x"), OTHERS)
def test_other_layers_come_back(make: object, x: torch.Tensor, verbs: list[str], tmp_path: Path) -> None:
    net = make()
    for verb in verbs:
        getattr(penjing, verb)(net)
    penjing.save(net, tmp_path / "saved")
    assert torch.equal(answers(penjing.load(tmp_path / "saved", into=make()), x), answers(net, x))
    if not isinstance(net, nn.TransformerEncoderLayer):  # which keeps its arguments in no attribute
        assert torch.equal(answers(penjing.load(tmp_path / "saved"), x), answers(net, x))


def test_int8_is_a_quarter_with_everything_counted(tmp_path: Path) -> None:
    net = SimpleNet()
    original = size(penjing.save(net, tmp_path / "float"))
    penjing.quantize(net)
    assert size(penjing.save(net, tmp_path / "int8")) <= 0.27 * original


def test_half_zeros_are_stored_in_a_half_and_their_mask(tmp_path: Path) -> None:
    net = SimpleNet()
    original = size(penjing.save(net, tmp_path / "float"))
    penjing.prune(net, 0.5)
    assert size(penjing.save(net, tmp_path / "pruned")) < 0.545 * original
    penjing.quantize(net, bits=4)
    assert size(penjing.save(net, tmp_path / "both")) < 0.12 * original


def test_a_loaded_pruned_module_keeps_its_zeros_in_training(tmp_path: Path) -> None:
    net, x = SimpleNet(), torch.rand(2, 3, 32, 32)
    penjing.prune(net)
    again = penjing.load(penjing.save(net, tmp_path / "saved")).train()
    optimizer = torch.optim.SGD(again.parameters(), 0.1)
    again(x).sum().backward()
    optimizer.step()
    again(x)
    assert torch.equal(again.fc1.weight == 0, net.fc1.weight == 0)


def test_tied_tensors_are_stored_once_and_come_back_tied(tmp_path: Path) -> None:
    for verb in ("prune", "quantize"):
        net = nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 50, bias=False))
        net[1].weight = net[0].weight
        getattr(penjing, verb)(net)
        folder = penjing.save(net, tmp_path / verb)
        again = penjing.load(folder)
        assert torch.equal(answers(again, torch.arange(50)), answers(net, torch.arange(50)))
        assert "1.weight" not in load_file(folder / "model.safetensors")
        name = "weight" if verb == "prune" else "weight_codes"
        assert getattr(again[0], name) is getattr(again[1], name)


def test_the_safetensors_library_reads_the_file(tmp_path: Path) -> None:
    net = SimpleNet()
    penjing.quantize(net)
    stored = load_file(penjing.save(net, tmp_path / "saved") / "model.safetensors")
    assert torch.equal(stored["conv1.weight"], net.conv1.weight_codes)
    weight = stored["fc1.weight"].float() * stored["fc1.weight.scale"]
    assert torch.equal(weight, net.fc1.weight)


class Hidden(nn.Module):
    """Its argument changes the computation and is kept in no attribute."""

    def __init__(self, slope: float = 0.1) -> None:
        super().__init__()
        self.layer, self.activation = nn.Linear(3, 2), nn.LeakyReLU(slope)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.activation(self.layer(x))


def test_a_class_that_cannot_be_rebuilt_needs_the_module(tmp_path: Path) -> None:
    usual = penjing.save(Hidden(), tmp_path / "usual")
    assert isinstance(penjing.load(usual), Hidden)
    special = penjing.save(Hidden(0.9), tmp_path / "special")
    with pytest.raises(BadInput, match="into=module"):
        penjing.load(special)
    x = torch.rand(1, 3) - 0.5
    again = penjing.load(special, into=Hidden(0.9))
    assert again(x).shape == (1, 2)


@pytest.mark.parametrize("name", ["os:system", "subprocess:Popen", "nowhere:Net", "builtins:eval", "antigravity:x"])
def test_nothing_that_a_file_names_is_imported_or_called(name: str, tmp_path: Path) -> None:
    folder = penjing.save(SimpleNet(), tmp_path / "saved")
    description = json.loads((folder / "module.json").read_text())
    description["module"] = {"class": name, "args": {"args": "true"}}
    (folder / "module.json").write_text(json.dumps(description))
    with pytest.raises(BadCheckpoint, match=f"the class {name} is not there"):
        penjing.load(folder)


def test_damaged_and_wrong_folders_are_refused(tmp_path: Path) -> None:
    net = SimpleNet()
    penjing.quantize(net)
    folder = penjing.save(net, tmp_path / "saved")
    with pytest.raises(BadCheckpoint, match=r"no module\.json"):
        penjing.load(tmp_path)
    with pytest.raises(BadCheckpoint, match="does not fit Linear"):
        penjing.load(folder, into=nn.Linear(2, 2))
    other = SimpleNet()
    other.fc1 = nn.Linear(400, 121)
    with pytest.raises(BadCheckpoint, match=r"fc1.*\(120, 400\) in the file, \(121, 400\) in the module"):
        penjing.load(folder, into=other)
    assert type(other.conv1) is nn.Conv2d
    more = SimpleNet()
    more.extra = nn.Linear(2, 2)
    with pytest.raises(BadCheckpoint, match=r"extra\.bias is in the module, but not in the file"):
        penjing.load(folder, into=more)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(BadCheckpoint, match="truncated"):
        penjing.load(folder)
    (folder / "module.json").write_text("{")
    with pytest.raises(BadCheckpoint, match="not JSON"):
        penjing.load(folder)


def test_saving_over_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(BadInput, match="already holds something else"):
        penjing.save(SimpleNet(), tmp_path)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(BadInput, match="already holds something else"):
        penjing.save(SimpleNet(), tmp_path / "file")
    folder = penjing.save(SimpleNet(), tmp_path / "saved")
    assert penjing.save(SimpleNet(), folder) == folder
