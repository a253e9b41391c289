"""`prune` against torch.nn.utils.prune and counts by hand; training on; structures really smaller."""

from __future__ import annotations

import copy

import pytest
import torch
from nets import Residual, SimpleNet, assert_untouched, attribute_dump, labelled, settle
from torch import nn
from torch.nn.utils import prune as torch_prune

import penjing
from penjing.errors import BadInput, PenjingError, Unsupported


def weights(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in net.named_parameters() if p.dim() > 1}


@pytest.mark.parametrize("method", ["l1", "l2"])
@pytest.mark.parametrize("amount", [0.1, 0.5, 0.87])
def test_each_layer_is_masked_as_torch_does(amount: float, method: str) -> None:
    net, twin = SimpleNet(), SimpleNet()
    twin.load_state_dict(net.state_dict())
    penjing.prune(net, amount, method)
    for part, theirs in zip(net.modules(), twin.modules(), strict=True):
        if isinstance(part, (nn.Conv2d, nn.Linear)):
            torch_prune.l1_unstructured(theirs, "weight", amount)
            assert torch.equal(part.weight, theirs.weight)


def test_global_scope_is_that_of_torch() -> None:
    net, twin = SimpleNet(), SimpleNet()
    twin.load_state_dict(net.state_dict())
    result = penjing.prune(net, 0.6, scope="global")
    pairs = [(part, "weight") for part in twin.modules() if isinstance(part, (nn.Conv2d, nn.Linear))]
    torch_prune.global_unstructured(pairs, torch_prune.L1Unstructured, amount=0.6)
    for (_, ours), (part, _) in zip(weights(net).items(), pairs, strict=True):
        assert torch.equal(ours, part.weight)
    assert "60.0%" not in str(result.rows[0])


def test_random_removes_the_share_whatever_the_magnitude_and_by_seed() -> None:
    original = SimpleNet()
    first, same, other = (copy.deepcopy(original) for _ in range(3))
    for net, seed in ((first, 1), (same, 1), (other, 2)):
        penjing.prune(net, 0.4, "random", seed=seed)
    assert torch.equal(first.fc1.weight, same.fc1.weight)
    assert not torch.equal(first.fc1.weight, other.fc1.weight)
    assert int((first.fc1.weight == 0).sum()) == round(0.4 * 48000)
    magnitude = original.fc1.weight.detach().abs()
    kept, gone = magnitude[first.fc1.weight != 0].mean(), magnitude[first.fc1.weight == 0].mean()
    assert abs(float(kept - gone)) < 0.05 * float(magnitude.mean())


@pytest.mark.parametrize(("keep", "of"), [(2, 4), (1, 4), (4, 8)])
def test_n_of_m_keeps_the_largest_of_each_group(keep: int, of: int) -> None:
    net = nn.Sequential(nn.Conv1d(8, 4, 3), nn.Flatten(), nn.Linear(24, 5))
    before = weights(net)
    penjing.prune(net, pattern=f"{keep}:{of}")
    for name, after in weights(net).items():
        for old, new in zip(before[name].reshape(-1, of), after.reshape(-1, of), strict=True):
            kept = sorted(range(of), key=lambda i, old=old: -abs(float(old[i])))[:keep]
            assert [float(v) for v in new] == [float(old[i]) if i in kept else 0.0 for i in range(of)]


@pytest.mark.parametrize("optimizer", ["before", "after"])
def test_zeros_survive_training(optimizer: str) -> None:
    net = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 1))
    x, y = torch.randn(64, 10), torch.randn(64, 1)

    def steps(made: torch.optim.Optimizer, count: int) -> None:
        for _ in range(count):
            made.zero_grad()
            nn.functional.mse_loss(net(x), y).backward()
            made.step()

    made = torch.optim.Adam(net.parameters(), 0.05, weight_decay=0.1)
    steps(made, 5)
    penjing.prune(net, 0.7)
    mask = net[0].weight == 0
    kept = net[0].weight.detach().clone()
    if optimizer == "after":
        made = torch.optim.Adam(net.parameters(), 0.05)
    steps(made, 5)
    assert torch.equal(net.state_dict()["0.weight"] == 0, mask)
    assert not torch.equal(net[0].weight, kept)
    assert list(net.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert torch.equal(copy.deepcopy(net)(x), net(x))


def test_rounds_reach_the_amount_with_training_between() -> None:
    net, seen = SimpleNet(), []

    def finetune(module: nn.Module) -> None:
        seen.append(float((module.fc1.weight == 0).float().mean()))
        with torch.no_grad():
            module.fc1.weight += 0.01

    result = penjing.prune(net, 0.8, rounds=3, finetune=finetune)
    assert seen == pytest.approx([0.8 * (1 - (2 / 3) ** 3), 0.8 * (1 - (1 / 3) ** 3), 0.8], abs=1e-4)
    assert float((net.fc1.weight == 0).float().mean()) == pytest.approx(0.8, abs=1e-4)
    assert "80.0% zeros" in str(result)


def test_recurrent_attention_and_shared_weights() -> None:
    for net, x in (
        (nn.LSTM(6, 8), torch.randn(3, 2, 6)),
        (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), torch.randn(2, 3, 8)),
    ):
        penjing.prune(net, 0.5)
        for name, tensor in weights(net).items():
            assert float((tensor == 0).float().mean()) == pytest.approx(0.5, abs=0.02), name
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        output = net(x)
        (output[0] if isinstance(output, tuple) else output).square().sum().backward()
        optimizer.step()
        net(x)
        for name, tensor in weights(net).items():
            assert float((tensor == 0).float().mean()) == pytest.approx(0.5, abs=0.02), name
    tied = nn.Sequential(nn.Embedding(8, 6), nn.Linear(6, 8, bias=False))
    tied[1].weight = tied[0].weight
    penjing.prune(tied, 0.25)
    assert tied[1].weight is tied[0].weight
    assert int((tied[0].weight == 0).sum()) == 12


def test_loss_change_and_sensitivity() -> None:
    net, (x, y) = SimpleNet().eval(), labelled(20)
    alone, loss = copy.deepcopy(net), nn.CrossEntropyLoss()
    result = penjing.prune(net, 0.9, data=[(x, y)], loss=loss, sensitivity=True)
    only = penjing.prune(alone, 0.9, data=[(x, y)], loss=loss, ignore=("conv*", "fc2", "fc3"))
    assert {row.layer: row.change for row in result.rows}["fc1"] == only.change
    assert result.change is not None
    assert result.change != only.change


def _check_trains(net: nn.Module, x: torch.Tensor) -> None:
    optimizer = torch.optim.SGD(net.parameters(), 1e-3)
    net.train()
    net(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in net.parameters())
    optimizer.step()


@pytest.mark.parametrize("method", ["l1", "l2", "random"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_channels_go_and_all_that_depends_on_them(method: str, scope: str) -> None:
    net, x = settle(Residual()), torch.randn(2, 3, 8, 8)
    before = sum(p.numel() for p in net.parameters())
    result = penjing.prune(net, 0.5, method, scope, "channel", example_inputs=x)
    after = sum(p.numel() for p in net.parameters())
    assert after < 0.6 * before
    assert net(x).shape == (2, 5)
    assert net.head.in_features == net.head.weight.shape[1] == net.bn2.num_features < 8
    assert result.bytes_after < 0.7 * result.bytes_before
    _check_trains(net, x)


def test_filters_leave_the_smallest_norms_out() -> None:
    """A chain without couplings: the survivors are the filters of largest norm, with their own numbers."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    with torch.no_grad():
        net[2].weight.fill_(0.1)  # so that only the first layer's norms tell its filters apart
    before = net[0].weight.detach().clone()
    penjing.prune(net, 0.25, pattern="filters", example_inputs=torch.randn(1, 3, 8, 8))
    kept = sorted(before.abs().sum((1, 2, 3)).argsort()[2:].tolist())
    assert torch.equal(net[0].weight, before[kept])
    assert net[2].weight.shape == (4, 6, 3, 3)


def test_neurons_leave_convolutions_alone_and_rounds_add_up() -> None:
    net, x = SimpleNet(), torch.randn(2, 3, 32, 32)
    penjing.prune(net, 0.5, pattern="neurons", example_inputs=x, rounds=3, finetune=lambda part: _check_trains(part, x))
    assert net.conv1.weight.shape == (6, 3, 5, 5)
    assert net.fc1.weight.shape[1] == 400
    assert abs(net.fc1.out_features - 60) <= 3
    assert net.fc2.weight.shape == (net.fc2.out_features, net.fc1.out_features)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 4
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, _ = x.shape
        q, k, v = (f(x).view(b, t, self.num_heads, 4).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(b, t, self.num_heads * 4))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attention, self.head = nn.Linear(6, 16), Attention(), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        return self.head(x + self.attention(x))


def test_heads_go_whole() -> None:
    net, x = Block(), torch.randn(2, 5, 6)
    before = net.attention.q.weight.detach().clone()
    heads = {f"attention.{name}": 4 for name in "qkv"}
    penjing.prune(net, 0.5, pattern="heads", example_inputs=x, heads=heads)
    assert net.attention.num_heads == 2
    assert net.attention.q.weight.shape == net.attention.v.weight.shape == (8, 16)
    assert net.attention.out.weight.shape == (16, 8)
    whole = before.view(4, 4, 16)
    for block in net.attention.q.weight.view(2, 4, 16):
        assert any(torch.equal(block, head) for head in whole)
    _check_trains(net, x)


BAD = [
    ({"amount": 0.0}, "amount=0.0: the share to remove lies between 0 and 1"),
    ({"amount": 1.0}, "between 0 and 1"),
    ({"amount": -0.5}, "between 0 and 1"),
    ({"method": "l3"}, "method='l3' is unknown"),
    ({"scope": "block"}, "scope='block' is unknown"),
    ({"pattern": "4:2"}, "0 < N < M"),
    ({"pattern": "2:4"}, "4 does not divide the inputs of conv1, conv2"),
    ({"pattern": "2:4", "amount": 0.3}, "contradicts"),
    ({"pattern": "filter"}, "did you mean 'filters'"),
    ({"pattern": "channel"}, "give example_inputs"),
    ({"pattern": "channel", "example_inputs": torch.zeros(1, 3, 5, 5)}, "does not run on example_inputs"),
    ({"pattern": "heads", "example_inputs": torch.zeros(1, 3, 32, 32)}, "needs heads="),
    ({"pattern": "heads", "example_inputs": torch.zeros(1, 3, 32, 32), "heads": {"fc9": 2}}, "'fc9' is no layer"),
    ({"pattern": "channel", "sensitivity": True}, "cut together"),
    ({"rounds": 0}, "rounds=0"),
    ({"ignore": ("conv3",)}, "matches no layer"),
    ({"loss": nn.CrossEntropyLoss()}, "without data"),
    ({"loss": nn.CrossEntropyLoss(), "data": []}, "data is empty"),
]


@pytest.mark.parametrize(("settings", "message"), BAD)
def test_bad_input_is_one_line_and_touches_nothing(settings: dict[str, object], message: str) -> None:
    net = SimpleNet()
    before = attribute_dump(net)
    with pytest.raises(PenjingError, match=message) as caught:
        penjing.prune(net, **settings)
    assert "\n" not in str(caught.value)
    assert_untouched(net, before)


def test_a_finetune_that_fails_leaves_the_module_as_it_was() -> None:
    net = SimpleNet()
    before, numbers = attribute_dump(net), copy.deepcopy(net.state_dict())
    with pytest.raises(ZeroDivisionError):
        penjing.prune(net, finetune=lambda module: 1 / 0)
    assert_untouched(net, before)
    assert all(torch.equal(tensor, numbers[name]) for name, tensor in net.state_dict().items())


def test_what_cannot_be_cut_is_named() -> None:
    with pytest.raises(BadInput, match="is an output"):
        penjing.prune(nn.Linear(4, 2), pattern="channel", example_inputs=torch.zeros(1, 4))
    layer = nn.TransformerEncoderLayer(8, 2, batch_first=True)
    with pytest.raises(Unsupported, match="self_attn is a MultiheadAttention"):
        penjing.prune(layer, pattern="heads", example_inputs=torch.zeros(1, 2, 8), heads={"linear1": 2})
