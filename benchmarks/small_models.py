"""int8 of SimpleNet and CIFAR ResNet-20: size of the file, latency of one image, agreement with float.

    python benchmarks/small_models.py [--mnist FOLDER]      writes docs/benchmarks/small_models.md

Float and int8 run in turn in one process, so that other work on the machine slows both alike; the table has the
median of the runs and their quartiles. ResNet-20 has real weights (tests/data/resnet20); CIFAR-10 itself is not at
hand, so its answers are compared on patches of scikit-learn's two photographs. FOLDER has MNIST's test set and a
trained network (mnist-t10k-*-ubyte.gz, mnist_cnn.onnx), whose accuracy is then measured.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import platform
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import penjing
from penjing import kernels
from penjing.stats import paired_change

ROOT = Path(__file__).parents[1]
WEIGHTS = ROOT / "tests" / "data" / "resnet20" / "resnet20-12fca82f.th"
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # those it was trained with


class SimpleNet(nn.Sequential):
    """The network of examples/simplenet.py, for any number of input channels and first padding."""

    def __init__(self, channels: int = 3, padding: int = 0) -> None:
        super().__init__(
            *(nn.Conv2d(channels, 6, 5, padding=padding), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
            *(nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)),
        )


class Block(nn.Module):
    """Two 3×3 convolutions and a shortcut that takes every second pixel and pads channels with zeros (option A)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.stride, self.more = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.more:
            half = self.more // 2
            x = functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, half))
        return functional.relu(y + x)


class ResNet20(nn.Module):
    """ResNet-20 for CIFAR (He et al., 2016, section 4.2): images (n, 3, 32, 32) → (n, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(Block(16, 16, 1) for _ in range(3)))
        self.layer2 = nn.Sequential(Block(16, 32, 2), Block(32, 32, 1), Block(32, 32, 1))
        self.layer3 = nn.Sequential(Block(32, 64, 2), Block(64, 64, 1), Block(64, 64, 1))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def resnet20() -> nn.Module:
    """With the trained weights: 91.78 % on CIFAR-10, as the file says of itself."""
    stored = torch.load(WEIGHTS, weights_only=True, map_location="cpu")["state_dict"]
    model = ResNet20()
    missing = model.load_state_dict({name.removeprefix("module."): w for name, w in stored.items()}, strict=False)
    assert all(name.endswith("num_batches_tracked") for name in missing.missing_keys)
    assert not missing.unexpected_keys
    return model.eval()


def patches(count: int) -> Tensor:
    """Natural images: patches of two photographs, made 32×32 and normalised as the network's training data were."""
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(0)
    photographs = [torch.tensor(image).permute(2, 0, 1).float() / 255 for image in load_sample_images().images]
    made = []
    for index in range(count):
        side = int(rng.integers(64, 256))
        top, left = int(rng.integers(0, 427 - side)), int(rng.integers(0, 640 - side))
        patch = photographs[index % 2][None, :, top : top + side, left : left + side]
        made.append(functional.interpolate(patch, size=(32, 32), mode="area"))
    return (torch.cat(made) - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(DEVIATION).view(3, 1, 1)


def latencies(models: list[nn.Module], image: Tensor, runs: int) -> list[list[float]]:
    """Microseconds of one image, `runs` for each model, in turn."""
    taken: list[list[float]] = [[] for _ in models]
    with torch.inference_mode():
        for run in range(runs + 10):
            for model, times in zip(models, taken, strict=True):
                start = time.perf_counter()
                for _ in range(5):
                    model(image)
                if run >= 10:
                    times.append((time.perf_counter() - start) / 5 * 1e6)
    return taken


def file_bytes(model: nn.Module) -> int:
    with tempfile.TemporaryDirectory() as folder:
        return sum(file.stat().st_size for file in penjing.save(model, Path(folder) / "saved").iterdir())


def spread(times: list[float]) -> str:
    low, middle, high = statistics.quantiles(times, n=4)
    return f"{middle:.0f} ({low:.0f}–{high:.0f})"


def compare(name: str, model: nn.Module, inputs: Tensor, runs: int) -> list[str]:
    """Table rows for dynamic and static int8 of a model, at 1 and 2 threads."""
    dynamic, static = copy.deepcopy(model), copy.deepcopy(model)
    penjing.quantize(dynamic)
    penjing.quantize(static, "static", data=inputs[: len(inputs) // 2])
    held_out = inputs[len(inputs) // 2 :]
    with torch.no_grad():
        answers = [part(held_out) for part in (model, dynamic, static)]
    times = {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        kernels.set_threads(threads)
        times[threads] = latencies([model, dynamic, static], inputs[:1], runs)
    rows = []
    original = file_bytes(model)
    for index, kind in enumerate(("float32", "int8 dynamic", "int8 static")):
        part = (model, dynamic, static)[index]
        stored = file_bytes(part)
        cells = [name, kind, f"{stored:,}", f"{stored / original:.3f}"]
        for threads in (1, 2):
            ratio = statistics.median(times[threads][index]) / statistics.median(times[threads][0])
            cells += [spread(times[threads][index]), f"{ratio:.2f}"]
        agree = float((answers[index].argmax(1) == answers[0].argmax(1)).float().mean())
        error = float((answers[index] - answers[0]).norm() / answers[0].norm())
        rows.append(f"| {' | '.join([*cells, f'{agree:.1%}', f'{error:.4f}'])} |")
    return rows


def mnist(folder: Path) -> list[str]:
    """Accuracy of a trained network on MNIST's 10 000 test digits, float and int8."""
    import onnx.numpy_helper

    graph = onnx.load(folder / "mnist_cnn.onnx").graph
    weights = {item.name: torch.tensor(onnx.numpy_helper.to_array(item)) for item in graph.initializer}
    model = SimpleNet(1, 2).eval()
    places = zip([0, 3, 7, 9, 11], [0, 3, 7, 9, 11], strict=True)
    model.load_state_dict(
        {f"{ours}.{k}": weights[f"net.{theirs}.{k}"] for ours, theirs in places for k in ("weight", "bias")}
    )
    images = np.frombuffer(gzip.decompress((folder / "mnist-t10k-images-idx3-ubyte.gz").read_bytes())[16:], np.uint8)
    labels = np.frombuffer(gzip.decompress((folder / "mnist-t10k-labels-idx1-ubyte.gz").read_bytes())[8:], np.uint8)
    x, y = torch.tensor(images).view(-1, 1, 28, 28).float() / 255, torch.tensor(labels).long()
    rows, base = [], None
    settings = {
        "float32": None,
        "int8 dynamic": {},
        "int8 static": {"method": "static", "data": x[:500]},
        "int4 dynamic": {"bits": 4},
        "int4 weights, groups of 5": {"method": "weight_only", "bits": 4, "group_size": 5, "ignore": ("9", "11")},
    }
    for kind, given in settings.items():
        part = copy.deepcopy(model)
        if given is not None:
            penjing.quantize(part, **given)
        with torch.no_grad():
            output = part(x[500:])
        losses = functional.cross_entropy(output, y[500:], reduction="none").numpy()
        base = losses if base is None else base
        change = "" if given is None else str(paired_change(base, losses))
        accuracy = float((output.argmax(1) == y[500:]).float().mean())
        rows.append(f"| {kind} | {accuracy:.2%} | {losses.mean():.4f} | {change} | {file_bytes(part):,} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mnist", type=Path, help="folder with MNIST's test set and mnist_cnn.onnx")
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "benchmarks" / "small_models.md")
    given = parser.parse_args()
    torch.manual_seed(0)
    rows = compare("SimpleNet", SimpleNet().eval(), patches(400), given.runs)
    rows += compare("ResNet-20", resnet20(), patches(400), given.runs)
    lines = [
        "# Small models in int8",
        "",
        f"Made by `python benchmarks/small_models.py` with torch {torch.__version__} on {platform.machine()}",
        f"({kernels.isa()}). Latency is of one 3×32×32 image in µs, median and quartiles of {given.runs} runs,",
        "all kinds in turn; *ratio* is to float32. Bytes count every file that `penjing.save` writes. SimpleNet has",
        "random weights here, ResNet-20 its trained ones. Agreement (same first class) and relative error of the",
        "outputs are on 200 patches of photographs, which are natural images but not CIFAR-10.",
        "",
        "| model | kind | bytes | ratio | 1 thread, µs | ratio | 2 threads, µs | ratio | agreement | error |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *rows,
    ]
    if given.mnist:
        lines += ["", "A trained LeNet on MNIST's test digits (500 to calibrate on, 9 500 measured):", ""]
        lines += [
            "| kind | accuracy | loss | ΔL with 95 % interval | bytes |",
            "|---|---|---|---|---|",
            *mnist(given.mnist),
        ]
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
