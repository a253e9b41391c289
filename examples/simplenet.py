"""The plainest network, compressed by `model.prune()` and `model.quantize()`.

    python examples/simplenet.py

Trains SimpleNet for some seconds on scikit-learn's handwritten digits, enlarged to 3×32×32, and prints accuracy, ΔL,
size and the latency of one image at each step. ΔL is on the test digits, with its 95 % interval.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

import penjing
from penjing.stats import paired_change


class SimpleNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(functional.relu(self.conv1(x)))
        x = self.pool(functional.relu(self.conv2(x)))
        x = torch.flatten(x, 1)
        x = functional.relu(self.fc1(x))
        x = functional.relu(self.fc2(x))
        return self.fc3(x)


def digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(images (n, 3, 32, 32) in [−1, 1], labels (n,)) to train on and to test on, in a fixed random order."""
    loaded = load_digits()
    images = torch.tensor(loaded.images, dtype=torch.float32)[:, None] / 8 - 1
    images = functional.interpolate(images, size=(32, 32), mode="bilinear").expand(-1, 3, -1, -1).contiguous()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], torch.tensor(loaded.target)[order]
    return (images[:1400], labels[:1400]), (images[1400:], labels[1400:])


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int, rate: float) -> None:
    optimizer = torch.optim.Adam(model.parameters(), rate)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(50):
            optimizer.zero_grad()
            functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    model.eval()


def milliseconds(models: list[nn.Module], image: Tensor) -> list[float]:
    """Median latency of one image for each model, measured in turn, so that other work slows all alike."""
    times: list[list[float]] = [[] for _ in models]
    with torch.inference_mode():
        for _ in range(60):
            for model, taken in zip(models, times, strict=True):
                start = time.perf_counter()
                for _ in range(5):
                    model(image)
                taken.append((time.perf_counter() - start) / 5)
    return [1000 * statistics.median(taken) for taken in times]


def size(model: nn.Module) -> int:
    """Bytes of the model as saved, headers and all."""
    with tempfile.TemporaryDirectory() as folder:
        return sum(file.stat().st_size for file in penjing.save(model, Path(folder) / "saved").iterdir())


def show(steps: dict[str, nn.Module], images: Tensor, labels: Tensor) -> None:
    latencies = milliseconds(list(steps.values()), images[:1])
    original: Tensor | None = None
    print(f"\n{'':<34}{'accuracy':>9}{'ΔL':>29}{'bytes':>10}{'one image':>12}")
    for (name, model), latency in zip(steps.items(), latencies, strict=True):
        with torch.no_grad():
            output = model(images)
        losses = functional.cross_entropy(output, labels, reduction="none")
        original = losses if original is None else original
        change = "" if losses is original else str(paired_change(original.numpy(), losses.numpy()))
        accuracy = float((output.argmax(1) == labels).float().mean())
        print(f"{name:<34}{accuracy:>9.1%}{change:>29}{size(model):>10,}{latency:>9.3f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10)
    epochs = parser.parse_args().epochs
    torch.manual_seed(0)
    training, test = digits()
    penjing.attach()

    model = SimpleNet()
    train(model, *training, epochs, 2e-3)
    steps: dict[str, nn.Module] = {"SimpleNet, float32": copy.deepcopy(model)}

    quantized = copy.deepcopy(model)
    print("model.quantize()", quantized.quantize(), sep="\n")
    steps["model.quantize()"] = quantized

    print("\nmodel.prune()", model.prune(), sep="\n")
    steps["model.prune()"] = copy.deepcopy(model)
    train(model, *training, max(1, epochs // 3), 1e-3)
    steps["model.prune(), trained on"] = copy.deepcopy(model)
    model.quantize()
    steps["model.prune() and model.quantize()"] = model

    show(steps, *test)


if __name__ == "__main__":
    main()
