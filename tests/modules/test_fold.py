"""Folding a batch norm changes no answer, however the module is put together."""

from __future__ import annotations

import copy

import pytest
import torch
from nets import Residual, settle
from torch import nn

import penjing
from penjing.modules.data import Batch
from penjing.modules.fold import FoldedBatchNorm, fold_batch_norms


def layers(module: nn.Module) -> list[nn.Module]:
    return [part for part in module.modules() if isinstance(part, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear))]


def folded(module: nn.Module) -> int:
    return sum(isinstance(part, FoldedBatchNorm) for part in module.modules())


NETS = [
    (nn.Sequential(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4)), (2, 2, 9)),
    (nn.Sequential(nn.Conv2d(4, 4, 3, groups=4, bias=False), nn.BatchNorm2d(4, affine=False)), (2, 4, 9, 9)),
    (nn.Sequential(nn.Conv3d(2, 4, 3), nn.BatchNorm3d(4), nn.ReLU()), (2, 2, 5, 5, 5)),
    (nn.Sequential(nn.Linear(6, 4, bias=False), nn.BatchNorm1d(4)), (3, 6)),
]


@pytest.mark.parametrize("with_data", [True, False])
@pytest.mark.parametrize(("net", "shape"), NETS)
def test_answers_stay(net: nn.Module, shape: tuple[int, ...], with_data: bool) -> None:
    net, x = settle(copy.deepcopy(net)), torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = net(x)
        assert len(fold_batch_norms(net, layers(net), Batch(x, None, len(x)) if with_data else None)) == 1
        torch.testing.assert_close(net(x), before, rtol=1e-5, atol=1e-5)
    assert folded(net) == 1


@pytest.mark.parametrize(("odd", "with_data", "expected"), [(False, False, 3), (True, True, 3), (True, False, 1)])
def test_residual_net_traced_observed_and_by_order(odd: bool, with_data: bool, expected: int) -> None:
    net, x = settle(Residual(odd)), torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = net(x)
        fold_batch_norms(net, layers(net), Batch(x, None, 2) if with_data else None)
        torch.testing.assert_close(net(x), before, rtol=1e-4, atol=1e-5)
    assert folded(net) == expected


class Shared(nn.Module):
    """The same convolution before two batch norms, and once bare; an output that is also used elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.a, self.b = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.other, self.c = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.other(x)
        return self.a(self.conv(x)) + self.b(self.conv(x + 1)) + self.c(y) * y


@pytest.mark.parametrize("with_data", [True, False])
def test_what_is_used_twice_is_not_folded(with_data: bool) -> None:
    net, x = settle(Shared()), torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = net(x)
        assert fold_batch_norms(net, layers(net), Batch(x, None, 2) if with_data else None) == []
        assert torch.equal(net(x), before)


def test_an_untraceable_module_whose_runs_mislead_is_put_back() -> None:
    """The layer's output goes to the batch norm and elsewhere; only the comparison of answers can tell."""

    class Misleading(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.sum() > 1e9:
                return x
            y = self.conv(x)
            return self.norm(y) + y.square()

    net, x = settle(Misleading()), torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = net(x)
        assert fold_batch_norms(net, layers(net), Batch(x, None, 2)) == []
        assert torch.equal(net(x), before)
    assert folded(net) == 0


def test_a_layer_left_alone_keeps_its_batch_norm() -> None:
    net = settle(Residual())
    result = penjing.quantize(net, ignore=("conv1",))
    assert isinstance(net.bn1, nn.BatchNorm2d)
    assert not isinstance(net.bn1, FoldedBatchNorm)
    assert folded(net) == 2
    assert sum("batch norm folded" in row.became for row in result.rows) == 2


def test_quantized_after_folding_is_close_to_float() -> None:
    net, x = settle(Residual()), torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = net(x)
    penjing.quantize(net)
    assert (net(x) - before).pow(2).mean() < 0.001 * before.var()
