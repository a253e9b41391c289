"""What each method costs and what it loses, layer by layer, on made inputs or on those of a real model.

    python benchmarks/methods.py                            seconds, on made layers of a 1.1-billion-parameter model
    python benchmarks/methods.py --model FOLDER --text FILE           losses, on what really comes into each layer

Seconds are those of one layer (out × in) with its statistics there; what layers of one input share (the hessian's
factor) is counted for each. Loss is tr(E H Eᵀ) of each layer as a share of round to nearest's (of magnitude
pruning's, of the papers' methods one after the other), the geometric mean over all layers, on the text that was
calibrated on. ``--model`` needs torch and transformers.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from penjing.formats.affine import AffineTensor
from penjing.methods import apply, linalg
from penjing.methods.statistics import KINDS, Collector, Statistics
from penjing.recipe import Prune, Quantize, Rule

SHAPES = ((5632, 2048), (2048, 5632))
QUANTIZERS = {
    "rtn": {},
    "rtn, mse": {"observer": "mse"},
    "hqq": {"method": "hqq"},
    "imatrix": {"method": "imatrix"},
    "autoround": {"method": "autoround"},
    "gptq as in the paper": {"method": "gptq", "observer": "minmax", "options": {"sweeps": 0}},
    "gptq": {"method": "gptq"},
}
PRUNERS = {
    "l1": {},
    "wanda": {"method": "wanda"},
    "sparsegpt as in the paper": {"method": "sparsegpt", "options": {"sweeps": 0}},
    "sparsegpt": {"method": "sparsegpt"},
    "gradual": {"method": "gradual"},
}
PAPER = (Prune(**PRUNERS["sparsegpt as in the paper"]), QUANTIZERS["gptq as in the paper"])
BITS = {"4 bits, g128": (4, 128, True), "3 bits, g128": (3, 128, False), "2 bits, g64": (2, 64, False)}
Layer = tuple[np.ndarray, Statistics]


def made(out: int, columns: int) -> Layer:
    """A layer with correlated inputs of uneven size."""
    rng = np.random.default_rng(0)
    collector = Collector(columns, KINDS)
    size = np.exp(rng.standard_normal(columns)).astype(np.float32)
    for _ in range(4):
        x = rng.standard_normal((2048, columns)).astype(np.float32) * size
        collector.add(x + x[:, ::-1] / 2)
    return rng.standard_t(5, (out, columns)).astype(np.float32) * np.float32(0.02), collector.statistics()


def real(model: str, text: Path) -> list[Layer]:
    """The weights of a model's linear layers, and statistics of 32 × 512 tokens."""
    import torch
    import transformers

    net = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokens = transformers.AutoTokenizer.from_pretrained(model)(text.read_text(), return_tensors="pt").input_ids[0]
    found = []
    for name, layer in net.named_modules():
        if isinstance(layer, torch.nn.Linear) and "lm_head" not in name:
            collector = Collector(layer.in_features, KINDS)
            layer.register_forward_pre_hook(lambda _, x, seen=collector: seen.add(x[0].flatten(0, -2).numpy()))
            found.append((layer.weight.detach().numpy(), collector))
    with torch.no_grad():
        for part in tokens[: 32 * 512].reshape(-1, 1, 512):
            net(part)
    return [(weight, collector.statistics()) for weight, collector in found]


def rules(bits: int, group: int, symmetric: bool) -> Iterator[tuple[str, Rule, Rule]]:
    """(name, rule, what it is compared with) for quantizers, and for pruning and quantizing together."""
    grid = {"bits": bits, "group_size": group, "symmetric": symmetric}
    for name, settings in QUANTIZERS.items():
        yield name, Rule(("*",), Quantize(**grid, **settings)), Rule(("*",), Quantize(**grid))
    one_by_one = Rule(("*",), Quantize(**grid, **PAPER[1]), PAPER[0])
    for pattern in ("unstructured", "2:4"):
        joint = Rule(("*",), Quantize("joint", **grid), Prune("joint", pattern=pattern))
        paper = Rule(("*",), one_by_one.quantize, Prune(PAPER[0].method, pattern=pattern, options=PAPER[0].options))
        yield f"joint 50 % {pattern}, against sparsegpt then gptq as in the papers", joint, paper


def solved(rule: Rule, layer: Layer) -> np.ndarray:
    found = apply.solve(rule, *layer, scale_dtype="bfloat16", seed=0)
    return found.decode() if isinstance(found, AffineTensor) else found


def loss(rule: Rule, layer: Layer) -> float:
    return linalg.relative_loss(layer[0], solved(rule, layer), layer[1]["hessian"])


def ratio(rule: Rule, base: Rule, layers: list[Layer]) -> float:
    """The geometric mean over layers of what one rule loses against another."""
    return math.exp(sum(math.log(loss(rule, layer) / loss(base, layer)) for layer in layers) / len(layers))


def losses(layers: list[Layer]) -> None:
    print("| method |", " | ".join(BITS), "|\n|---|" + "---:|" * len(BITS))
    for row in zip(*(rules(*grid) for grid in BITS.values()), strict=True):
        found = [ratio(rule, base, layers) for _, rule, base in row]
        print(f"| {row[0][0]} |", " | ".join(f"{each:.3f}" for each in found), "|", flush=True)
    print("\n| pruner | 50 % | 2:4 |\n|---|---:|---:|")
    for name, settings in PRUNERS.items():
        found = []
        for pattern in ("unstructured", "2:4"):
            rule, base = (Rule(("*",), prune=Prune(pattern=pattern, **each)) for each in (settings, {}))
            found.append(ratio(rule, base, layers))
        print(f"| {name} |", " | ".join(f"{each:.3f}" for each in found), "|", flush=True)


def seconds() -> None:
    layers = [made(*shape) for shape in SHAPES]
    print("| method |", " | ".join(f"{out} × {columns}" for out, columns in SHAPES), "|")
    print("|---|" + "---:|" * len(SHAPES))
    taken = [timed(lambda s=s: linalg.factor(s, len(s["mean"]), 0.01, True)) for _, s in layers]
    print("| the hessian's factor, in what follows |", " | ".join(f"{each:.2f}" for each in taken), "|", flush=True)
    quantizing = {name: rule for name, rule, _ in rules(*BITS["4 bits, g128"])}
    pruning = {name: Rule(("*",), prune=Prune(**settings)) for name, settings in PRUNERS.items()}
    for name, rule in (quantizing | pruning).items():
        taken = [timed(lambda each=each, rule=rule: solved(rule, (each[0], Statistics(each[1])))) for each in layers]
        print(f"| {name.partition(', against')[0]} |", " | ".join(f"{each:.2f}" for each in taken), "|", flush=True)


def timed(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model's folder")
    parser.add_argument("--text", type=Path, help="text that it reads")
    given = parser.parse_args()
    if given.model:
        losses(real(given.model, given.text))
    else:
        seconds()
