"""`quantize` on whole modules: against float modules with the decoded weights, and its errors."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from nets import Residual, SimpleNet, assert_untouched, attribute_dump, labelled, settle
from torch import nn

import penjing
from penjing.errors import BadInput, PenjingError, Unsupported
from penjing.stats import paired_change


def decoded_twin(original: nn.Module, quantized: nn.Module) -> nn.Module:
    """The float module with the numbers that the codes stand for."""
    twin = copy.deepcopy(original)
    for name, part in twin.named_modules():
        coded = getattr(quantized.get_submodule(name), "coded", None)
        for parameter in coded.grids if coded else ():
            part.get_parameter(parameter).data.copy_(getattr(quantized.get_submodule(name), parameter))
    return twin.eval()


class Attention(nn.Module):
    def __init__(self, **settings: object) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True, **settings)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        side = x[..., :5] if self.attention.kdim == 5 else x
        return self.attention(x, side, side)[0]


STORED = [
    (nn.LSTM(6, 5, num_layers=2, bidirectional=True, batch_first=True), (2, 7, 6)),
    (nn.LSTM(6, 5, proj_size=3), (7, 2, 6)),
    (nn.GRU(6, 5, bias=False), (7, 2, 6)),
    (nn.RNN(6, 5, nonlinearity="relu"), (7, 6)),
    (Attention(), (2, 4, 12)),
    (Attention(kdim=5, vdim=5, bias=False), (2, 4, 12)),
    (nn.TransformerEncoderLayer(12, 2, 24, batch_first=True), (2, 4, 12)),
    (nn.TransformerEncoder(nn.TransformerEncoderLayer(12, 2, 24, batch_first=True), 2), (2, 4, 12)),
]


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("original", "shape"), STORED)
def test_recurrent_and_attention_compute_on_the_decoded_weights(
    original: nn.Module, shape: tuple[int, ...], bits: int
) -> None:
    module = copy.deepcopy(original).eval()
    penjing.quantize(module, "weight_only", bits)
    twin = decoded_twin(original, module)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs, plain = module(x), twin(x), original.eval()(x)
    ours, theirs, plain = (y[0] if isinstance(y, tuple) else y for y in (ours, theirs, plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert not torch.equal(theirs, plain)


def test_integer_layers_run_inside_a_transformer_layer() -> None:
    """torch's fused path would read their weights and compute in float."""
    layer = nn.TransformerEncoderLayer(12, 2, 24, batch_first=True).eval()
    penjing.quantize(layer)
    calls = []
    for part in (layer.linear1, layer.linear2):
        inner = part.forward
        part.forward = lambda x, inner=inner: (calls.append(1), inner(x))[1]
    with torch.no_grad():
        layer(torch.randn(1, 4, 12))
    assert len(calls) == 2


def test_packed_sequences_still_run() -> None:
    module = nn.LSTM(3, 4, batch_first=True)
    twin = copy.deepcopy(module)
    penjing.quantize(module)
    packed = nn.utils.rnn.pack_padded_sequence(torch.randn(2, 5, 3), torch.tensor([5, 2]), batch_first=True)
    torch.testing.assert_close(module(packed)[0].data, decoded_twin(twin, module)(packed)[0].data)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [-1, 0, 4])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_weight_only_equals_float_on_the_decoded_weights(bits: int, group_size: int, symmetric: bool) -> None:
    original = nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4)).eval()
    module = copy.deepcopy(original)
    penjing.quantize(module, "weight_only", bits, group_size, symmetric)
    x = torch.randint(0, 11, (3, 5), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(module(x), decoded_twin(original, module)(x), rtol=1e-5, atol=1e-5)
    step = module[1].weight_scale.float()
    error = (module[1].weight - original[1].weight).abs().reshape(12, step.shape[1], -1)
    if step.numel() == 1:
        error = error.reshape(1, 1, -1)
    # half a step, and as much again where the zero point was rounded; 16-bit steps move the last code a little
    reach = (0.5 if symmetric else 1.0) + 2 ** (bits - 1) / (256 if group_size > 0 and bits <= 4 else 1e6)
    assert bool((error <= reach * step[..., None] + 1e-6).all())


def test_embedding_bag_and_weight_only_convolution() -> None:
    for original, x in (
        (nn.EmbeddingBag(9, 4), torch.tensor([[1, 2, 8]])),
        (nn.Conv1d(4, 6, 3, groups=2), torch.randn(2, 4, 9)),
    ):
        module = copy.deepcopy(original)
        penjing.quantize(module, "weight_only", 4)
        torch.testing.assert_close(module(x), decoded_twin(original, module)(x))


@pytest.mark.parametrize("observer", ["minmax", "percentile", "mse"])
def test_static_is_close_to_float_with_each_observer(observer: str) -> None:
    net, (x, y) = settle(Residual()), labelled(40, size=8)
    with torch.no_grad():
        before = net(x)
    result = penjing.quantize(net, "static", data=(x, y), loss=nn.CrossEntropyLoss(), observer=observer)
    after = net(x)
    assert (after - before).pow(2).mean() < 0.01 * before.var()
    assert result.change is not None
    assert result.change.n == 20


@pytest.mark.parametrize("symmetric", [True, False])
def test_loss_change_is_that_of_the_samples(symmetric: bool) -> None:
    net, (x, y) = SimpleNet().eval(), labelled(30)
    none = nn.CrossEntropyLoss(reduction="none")
    with torch.no_grad():
        before = none(net(x), y)
    batches = [(x[:13], y[:13]), (x[13:], y[13:])]
    result = penjing.quantize(net, bits=3, symmetric=symmetric, data=iter(batches), loss=nn.CrossEntropyLoss())
    with torch.no_grad():
        after = none(net(x), y)
    oracle = paired_change(before.double().numpy(), after.double().numpy())
    assert result.change is not None
    got = (result.change.mean, result.change.low, result.change.high)
    assert got == pytest.approx((oracle.mean, oracle.low, oracle.high), abs=1e-6)
    assert result.base_loss == pytest.approx(float(before.mean()), abs=1e-6)
    assert "30 held-out samples" in str(result)


def test_functions_with_a_mean_are_measured_sample_by_sample() -> None:
    net, (x, y) = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), (torch.randn(9, 12), torch.randn(9, 3))
    twin = copy.deepcopy(net)
    result = penjing.quantize(net, bits=2, data=(x, y), loss=lambda a, b: (a - b).square().mean())
    per_sample = [((m(x) - y) ** 2).mean(1).detach().double().numpy() for m in (twin, net)]
    assert result.change is not None
    assert result.change.low == pytest.approx(paired_change(*per_sample).low, abs=1e-6)


def test_sensitivity_is_the_change_of_one_layer_alone() -> None:
    net, (x, y) = SimpleNet().eval(), labelled(20)
    loss = nn.CrossEntropyLoss()
    alone = copy.deepcopy(net)
    result = penjing.quantize(net, bits=2, data=(x, y), loss=loss, sensitivity=True)
    only = penjing.quantize(alone, bits=2, data=(x, y), loss=loss, ignore=("conv*", "fc1", "fc3"))
    assert only.change is not None
    by_name = {row.layer: row.change for row in result.rows}
    assert by_name["fc2"] == only.change
    assert list(by_name) == ["conv1", "conv2", "fc1", "fc2", "fc3"]


def test_attach_gives_every_module_the_verbs_and_only_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for verb in ("quantize", "prune"):
        monkeypatch.delattr(nn.Module, verb, raising=False)
        assert not hasattr(nn.Module, verb)
    penjing.attach()
    penjing.attach()
    model = SimpleNet()
    assert "conv1" in str(model.prune())
    result = model.quantize()
    assert "int8 × int8 dynamic, a step a channel" in str(result)
    assert result.bytes_before < 0.54 * 248_024
    assert result.bytes_after < 0.18 * 248_024
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


def test_tied_weights_stay_tied() -> None:
    class Language(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.embedding(x))

    tied = Language()
    result = penjing.quantize(tied, "weight_only", 8)
    assert tied.head.weight_codes is tied.embedding.weight_codes
    assert result.bytes_after == 20 * 8 + 20 * 4
    left = Language()
    with pytest.raises(BadInput, match="shared with a layer that is left alone"):
        penjing.quantize(left, ignore=("embedding",))


def test_a_layer_used_twice_is_one_layer() -> None:
    shared = nn.Linear(6, 6)
    net = nn.Sequential(shared, nn.Tanh(), shared)
    result = penjing.quantize(net)
    assert net[0] is net[2]
    assert len(result.rows) == 1
    assert net(torch.zeros(1, 6)).shape == (1, 6)


BAD = [
    ({"method": "dynamc"}, "did you mean 'dynamic'"),
    ({"bits": 1}, "2 to 8 bits"),
    ({"bits": 16}, "2 to 8 bits"),
    ({"group_size": 5}, "groups need method='weight_only'"),
    ({"group_size": 7, "method": "weight_only"}, "conv1.weight: group_size=7 does not divide 75"),
    ({"group_size": -2}, "group_size=-2"),
    ({"ignore": ("conv9",)}, "'conv9' matches no layer: did you mean 'conv"),
    ({"ignore": ("*",)}, "no layer to quantize"),
    ({"method": "static"}, "needs data="),
    ({"method": "static", "data": []}, "data is empty"),
    ({"method": "static", "data": iter(())}, "data is empty"),
    ({"method": "static", "data": torch.zeros(0, 3, 32, 32)}, "data is empty"),
    ({"method": "static", "data": 3}, "data is a int"),
    ({"method": "static", "data": torch.zeros(4, 3, 32, 32), "observer": "mean"}, "observer='mean' is unknown"),
    ({"method": "static", "data": torch.full((4, 3, 32, 32), torch.nan)}, "NaN or infinity"),
    ({"loss": nn.CrossEntropyLoss()}, "without data"),
    ({"sensitivity": True}, "sensitivity=True needs loss="),
    ({"loss": nn.CrossEntropyLoss(), "data": torch.zeros(4, 3, 32, 32)}, "a loss needs targets"),
    ({"loss": nn.MSELoss(), "data": [(torch.zeros(1, 3, 32, 32), None)], "method": "static"}, "1 sample"),
]


@pytest.mark.parametrize(("settings", "message"), BAD)
def test_bad_input_is_one_line_and_touches_nothing(settings: dict[str, object], message: str) -> None:
    net = SimpleNet()
    before = attribute_dump(net)
    with pytest.raises(PenjingError, match=message) as caught:
        penjing.quantize(net, **settings)
    assert "\n" not in str(caught.value)
    assert_untouched(net, before)
    assert net.training
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_a_loss_that_fails_leaves_the_module_as_it_was() -> None:
    net, (x, y) = settle(Residual()), labelled(8, size=8)
    before = attribute_dump(net)
    calls = []

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) > 9:
            raise ZeroDivisionError
        return nn.functional.cross_entropy(output, target)

    with pytest.raises(ZeroDivisionError):
        penjing.quantize(net, data=(x, y), loss=loss)
    assert_untouched(net, before)


def test_modules_that_cannot_be_quantized_are_named() -> None:
    with pytest.raises(BadInput, match="a dict was given"):
        penjing.quantize({})
    with pytest.raises(BadInput, match="no layer to quantize in ReLU"):
        penjing.quantize(nn.ReLU())
    with pytest.raises(BadInput, match="meta device"):
        penjing.quantize(nn.Linear(2, 2, device="meta"))
    with pytest.raises(BadInput, match="has no shape yet"):
        penjing.quantize(nn.Sequential(nn.LazyLinear(2)))
    transposed = nn.Sequential(nn.Linear(2, 2), nn.ConvTranspose2d(2, 2, 2))
    with pytest.raises(Unsupported, match="1 is a ConvTranspose2d"):
        penjing.quantize(transposed)
    penjing.quantize(transposed, ignore=("1",))
    broken = nn.Linear(3, 2)
    nn.init.constant_(broken.weight, np.nan)
    with pytest.raises(BadInput, match="weight has 6 values that are NaN"):
        penjing.quantize(broken)
    done = SimpleNet()
    penjing.quantize(done)
    with pytest.raises(BadInput, match="already quantized"):
        penjing.quantize(done)


def test_a_layer_that_calibration_never_reaches_is_named() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    with pytest.raises(BadInput, match="never reach spare"):
        penjing.quantize(Two(), "static", data=torch.randn(4, 3))
