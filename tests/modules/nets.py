"""Small networks that the tests of modules share."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class SimpleNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(400, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(functional.relu(self.conv1(x)))
        x = self.pool(functional.relu(self.conv2(x)))
        x = functional.relu(self.fc1(x.flatten(1)))
        return self.fc3(functional.relu(self.fc2(x)))


class Residual(nn.Module):
    """Convolutions with batch norm and a shortcut, as in a ResNet; ``odd`` makes it untraceable."""

    def __init__(self, odd: bool = False) -> None:
        super().__init__()
        self.odd = odd
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8, affine=False)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        if self.odd and x.sum() > 1e9:
            return x
        x = self.stem(x)
        y = functional.relu(self.bn1(self.conv1(x)))
        y = functional.relu(self.bn2(self.conv2(y)) + x)
        return self.head(y.mean((2, 3)))


def settle(module: nn.Module, seed: int = 0) -> nn.Module:
    """Batch norms with statistics and affine parameters of their own, as after training; evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    for part in module.modules():
        if isinstance(part, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
            part.running_mean.uniform_(-1, 1, generator=generator)
            part.running_var.uniform_(0.3, 2, generator=generator)
            if part.affine:
                nn.init.uniform_(part.weight, 0.5, 1.5, generator=generator)
                nn.init.uniform_(part.bias, -1, 1, generator=generator)
    return module.eval()


def labelled(samples: int, seed: int = 0, size: int = 32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 3, size, size, generator=generator)
    return x, torch.randint(0, 5, (samples,), generator=generator)


def attribute_dump(module: nn.Module) -> list[tuple[str, type, dict[str, Tensor]]]:
    """What must be as before after a refused call: classes and tensors."""
    return [(name, type(part), {**part._parameters, **part._buffers}) for name, part in module.named_modules()]


def assert_untouched(module: nn.Module, before: list[tuple[str, type, dict[str, Tensor]]]) -> None:
    after = attribute_dump(module)
    assert [(name, cls, list(tensors)) for name, cls, tensors in after] == [
        (name, cls, list(tensors)) for name, cls, tensors in before
    ]
    for (_, _, new), (_, _, old) in zip(after, before, strict=True):
        for name, tensor in new.items():
            assert tensor is old[name]
