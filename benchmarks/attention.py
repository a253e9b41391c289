"""Attention over the paged cache: decoding at some lengths and prefill, for each type of cache, beside torch's SDPA.

    python benchmarks/attention.py [--heads 32 4 64] [--layers 22] [--threads N] [--seconds S]

Decoding: milliseconds a token for all layers (each has its own cache, so that a long one does not stay in the
processor's), and the gigabytes of cache read a second. Prefill: GFLOP/s of one layer, counting what a causal mask
leaves. All run in turn in one process, so that other work on the machine slows all alike; medians. torch keeps its
cache contiguous and appends nothing to it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from penjing import kernels
from penjing.kernels import KV_TOKENS, KV_TYPES, KvPool

Run = Callable[[], object]
RNG = np.random.default_rng(1)


def measured(runs: dict[str, Run], seconds: float) -> dict[str, float]:
    """Median seconds of each."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or len(next(iter(times.values()))) < 3:
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(each) for name, each in times.items()}


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape, np.float32)


def cached(kv_type: str, length: int, layers: int, heads: tuple[int, int, int]) -> tuple[KvPool, np.ndarray]:
    """A pool that holds `length` positions of each layer, and the table of their blocks, shuffled."""
    _, kv_heads, dim = heads
    blocks = length // KV_TOKENS + 1
    pool, table = KvPool([(kv_heads, dim, dim)] * layers, kv_type, blocks), RNG.permutation(blocks).astype(np.int32)
    for layer in range(layers):
        keys, values = normal(length, kv_heads, dim), normal(length, kv_heads, dim)
        pool.attend(layer, [(normal(length, kv_heads, dim), keys, values, table, 0)], window=1)
    return pool, table


def decoding(length: int, layers: int, heads: tuple[int, int, int], seconds: float) -> None:
    query_heads, kv_heads, dim = heads
    runs: dict[str, Run] = {}
    sizes: dict[str, int] = {}
    query, key, value = normal(1, query_heads, dim), normal(1, kv_heads, dim), normal(1, kv_heads, dim)
    for kv_type in KV_TYPES:
        pool, table = cached(kv_type, length, layers, heads)
        sizes[kv_type] = KvPool.block_bytes([(kv_heads, dim, dim)] * layers, kv_type) * length // KV_TOKENS
        runs[kv_type] = lambda pool=pool, table=table: [
            pool.attend(layer, [(query, key, value, table, length - 1)]) for layer in range(layers)
        ]
    for kind in (torch.float32, torch.bfloat16):
        q = torch.from_numpy(query).swapaxes(0, 1)[None].to(kind)
        kv = torch.randn(layers, 2, 1, kv_heads, length, dim).to(kind)
        name = f"torch {str(kind).removeprefix('torch.')}"
        sizes[name] = kv.nbytes
        runs[name] = lambda q=q, kv=kv: [scaled_dot_product_attention(q, k, v, enable_gqa=True) for k, v in kv]
    print(f"\ndecoding at {length} positions, {layers} layers of {query_heads}/{kv_heads} heads of {dim}")
    for name, took in measured(runs, seconds).items():
        print(f"  {name:16} {1e3 * took:8.3f} ms a token  {sizes[name] / took / 1e9:6.1f} GB/s")


def prefill(n: int, heads: tuple[int, int, int], seconds: float) -> None:
    query_heads, kv_heads, dim = heads
    runs: dict[str, Run] = {}
    q, k, v = normal(n, query_heads, dim), normal(n, kv_heads, dim), normal(n, kv_heads, dim)
    for kv_type in KV_TYPES:
        pool, table = cached(kv_type, n, 1, heads)
        runs[kv_type] = lambda pool=pool, table=table: pool.attend(0, [(q, k, v, table, 0)])
    for kind in (torch.float32, torch.bfloat16):
        t = [torch.from_numpy(each).swapaxes(0, 1)[None].contiguous().to(kind) for each in (q, k, v)]
        runs[f"torch {str(kind).removeprefix('torch.')}"] = lambda t=t: scaled_dot_product_attention(
            *t, is_causal=True, enable_gqa=True
        )
    print(f"\nprefill of {n} positions, {query_heads}/{kv_heads} heads of {dim}")
    products = query_heads * dim * n * (n + 1)  # of keys and of values, at two operations each
    for name, took in measured(runs, seconds).items():
        print(f"  {name:16} {1e3 * took:8.2f} ms  {2 * products / took / 1e9:6.1f} GFLOP/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--heads", type=int, nargs=3, default=[32, 4, 64], help="of queries, of keys, their size")
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--lengths", type=int, nargs="*", default=[100, 1000, 4000])
    parser.add_argument("--prefill", type=int, nargs="*", default=[512, 2048])
    parser.add_argument("--threads", type=int, default=kernels.threads())
    parser.add_argument("--seconds", type=float, default=3, help="for each table")
    options = parser.parse_args()
    kernels.set_threads(options.threads)
    torch.set_num_threads(options.threads)
    print(f"{kernels.isa()}, {options.threads} threads, torch {torch.__version__}")
    for length in options.lengths:
        decoding(length, options.layers, tuple(options.heads), options.seconds)
    for n in options.prefill:
        prefill(n, tuple(options.heads), options.seconds)


if __name__ == "__main__":
    main()
