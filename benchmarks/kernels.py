"""Matrix products of every layout: speed of one row, of eight and of 512, beside torch's.

    python benchmarks/kernels.py [--shape OUT IN]... [--rounds 20]

One row is bound by memory, so it is given in bytes per second beside what this machine reads (the weights take turns
with copies of themselves, so that they come from memory and not from a cache). 512 rows are bound by arithmetic and
given in operations per second, two a weight and row. The layouts run in turn, round after round in one process, so that
other work on the machine slows all alike, and the best of each is kept.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from penjing import hardware, kernels
from penjing.formats.affine import Grid

SHAPES = [(2048, 2048), (5632, 2048), (2048, 5632), (32000, 2048)]
BATCHES = (1, 8, 512)
MEMORY = 96 << 20  # bytes of copies: more than any cache here
Product = Callable[[NDArray[np.float32]], Any]


def layouts(weight: NDArray[np.float32]) -> dict[str, tuple[int, Callable[[], Product]]]:
    """Name → bytes of the weight, and what makes a product with a copy of it."""
    pruned = kernels.prune(weight, 0.5, "row")
    made: dict[str, tuple[int, Callable[[], Product]]] = {}

    def add(name: str, values: NDArray[np.float32], grid: Grid, activations: Any, sparse: bool) -> None:
        tensor = kernels.quantize(values, grid)

        def copy() -> kernels.Matrix:
            return kernels.matrix_from(tensor, activations=activations, sparse=sparse)

        made[name] = copy().nbytes, copy

    groups = {bits: Grid(bits, 128, scale_dtype="bfloat16") for bits in (2, 3, 4, 8)}
    for bits in (8, 4, 3, 2):
        add(f"int{bits} g128", weight, groups[bits], "int8-groups", False)
    add("int4 g32", weight, Grid(4, 32, scale_dtype="bfloat16"), "int8-groups", False)
    add("W8A8", weight, Grid(8), "int8", False)
    add("int8 g128, half zeros", pruned, groups[8], "int8-groups", True)
    add("int4 g128, half zeros", pruned, groups[4], "int8-groups", True)
    add("int4 g128, two of four", kernels.prune(weight, 0.5, pattern=(2, 4)), groups[4], "int8-groups", True)
    add("W8A8, half zeros", pruned, Grid(8), "int8", True)
    add("int4 g128, float x", weight, groups[4], "float", False)
    made["float32"] = weight.nbytes, lambda: kernels.matrix_from(weight, sparse=False)
    made["torch float32"] = weight.nbytes, lambda: torch_linear(torch.tensor(weight))
    made["torch bfloat16"] = weight.nbytes // 2, lambda: torch_linear(torch.tensor(weight).bfloat16())
    made["torch int8 × int8"] = weight.nbytes // 4, lambda: torch_int8(weight)
    return made


def torch_linear(weight: torch.Tensor) -> Product:
    return lambda x: torch.nn.functional.linear(torch.from_numpy(x).to(weight.dtype), weight)


def torch_int8(weight: NDArray[np.float32]) -> Product:
    """torch._int_mm alone: neither quantizing x nor the steps of the result."""
    codes = torch.from_numpy(kernels.quantize(weight, Grid(8)).codes)
    x_codes = {m: torch.randint(-127, 128, (m, codes.shape[1]), dtype=torch.int8) for m in BATCHES}
    return lambda x: torch._int_mm(x_codes[len(x)], codes.T)


def measure(shape: tuple[int, int], rounds: int) -> None:
    weight = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    made = layouts(weight)
    copies = {name: [make() for _ in range(1 + min(12, MEMORY // size))] for name, (size, make) in made.items()}
    read = hardware.bandwidth_gbps()
    best = {m: fastest(copies, np.random.default_rng(m).standard_normal((m, shape[1])), rounds) for m in BATCHES}
    read = max(read, hardware.bandwidth_gbps())
    print(f"\n{shape[0]} × {shape[1]}; memory is read at {read} GB/s")
    print(f"{'':22} {'GB/s, 1 row':>12} {'of reading':>10} {'ms, 1':>8} {'ms, 8':>8} {'ms, 512':>8} {'TOPS, 512':>10}")
    for name, (size, _) in made.items():
        rate, tops = size / best[1][name] / 1e9, 2 * 512 * weight.size / best[512][name] / 1e12
        times = " ".join(f"{1e3 * best[m][name]:8.3f}" for m in BATCHES)
        print(f"{name:22} {rate:12.1f} {rate / read:10.0%} {times} {tops:10.2f}", flush=True)


def fastest(copies: dict[str, list[Product]], x: NDArray[np.float64], rounds: int) -> dict[str, float]:
    """Seconds of the fastest product of each layout; every round uses each copy once, or one copy for many rows."""
    rows, best = x.astype(np.float32), dict.fromkeys(copies, float("inf"))
    for _ in range(rounds if len(x) < 100 else max(2, rounds // 5)):
        for name, products in copies.items():
            for product in products if len(x) < 100 else products[:1]:
                start = time.perf_counter()
                product(rows)
                best[name] = min(best[name], time.perf_counter() - start)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs=2, type=int, action="append", metavar=("OUT", "IN"))
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(kernels.threads())
    print(f"{hardware.cpu_name()}, {kernels.isa()}, {kernels.threads()} threads, torch {torch.__version__}")
    for shape in options.shape or SHAPES:
        measure((shape[0], shape[1]), options.rounds)


if __name__ == "__main__":
    main()
