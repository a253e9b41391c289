"""Attention over the paged cache against plain numpy in float64, on every instruction set of this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from penjing import kernels
from penjing.kernels import KV_TOKENS, KV_TYPES, MAX_KV_DIM, KvPool, reference

# (positions, heads, kv_heads, key_dim, value_dim, window, softcap, sinks). Blocks of 32 positions, spans of 128, blocks
# of 128 rows and vectors of 16 begin, end and straddle; heads of odd sizes, wider than they give, and the widest.
SHAPES: list[tuple[int, int, int, int, int, int | None, float | None, bool]] = [
    (1, 6, 2, 64, 64, None, None, False),
    (1, 4, 1, 33, 1, None, None, True),
    (31, 3, 3, 1, 7, None, None, False),
    (32, 4, 2, 16, 16, 32, None, False),
    (33, 8, 1, 40, 24, 33, 4.0, False),
    (128, 4, 2, 64, 64, None, 30.0, True),
    (129, 7, 1, 80, 100, 31, None, True),
    (150, 20, 1, 17, 47, 1, None, False),
    (150, 12, 2, 32, 65, 2, None, True),
    (300, 6, 2, 64, 64, None, None, False),
    (300, 8, 8, 10, 6, 130, None, False),
    (270, 5, 1, 192, 128, None, None, False),
    (70, 3, 1, MAX_KV_DIM, 512, None, None, True),
    (67, 2, 2, 256, MAX_KV_DIM, 64, 50.0, False),
]


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape, np.float32)


def inputs() -> Iterator[tuple[list[np.ndarray], dict[str, Any]]]:
    rng = np.random.default_rng(11)
    for n, heads, kv_heads, key_dim, value_dim, window, softcap, sinks in SHAPES:
        rows = normal(rng, n, heads * key_dim + kv_heads * (key_dim + value_dim) + 3)  # parts of wider rows
        ends = np.cumsum([heads * key_dim, kv_heads * key_dim, kv_heads * value_dim])
        q, k, v, _ = np.split(rows, ends, axis=1)
        arrays = [2 * q.reshape(n, heads, key_dim), k.reshape(n, kv_heads, key_dim), v.reshape(n, kv_heads, value_dim)]
        sink = 3 * normal(rng, heads) if sinks else None
        yield arrays, {"window": window, "softcap": softcap, "sinks": sink}


def pool_for(keys: np.ndarray, values: np.ndarray, kv_type: str, blocks: int) -> KvPool:
    return KvPool([(0, 0, 0), (keys.shape[1], keys.shape[2], values.shape[2])], kv_type, blocks)


def attend(pool: KvPool, chunks: list, rule: dict[str, Any]) -> list[np.ndarray]:
    return pool.attend(1, chunks, rule["window"] or 0, None, rule["softcap"] or 0, rule["sinks"])


def in_chunks(arrays: list[np.ndarray], rule: dict[str, Any], kv_type: str, sizes: Iterator[int]) -> np.ndarray:
    """The whole sequence, some positions at a time, in blocks that lie in any order."""
    n = len(arrays[0])
    rng = np.random.default_rng(n)
    blocks = -(-n // KV_TOKENS)
    table = rng.permutation(blocks + 5)[:blocks].astype(np.int32)
    pool, results, start = pool_for(*arrays[1:], kv_type, blocks + 5), [], 0
    while start < n:
        end = min(n, start + next(sizes))
        results += attend(pool, [(*(each[start:end] for each in arrays), table, start)], rule)
        start = end
    return np.concatenate(results)


def sizes(*given: int) -> Iterator[int]:
    while True:
        yield from given


def errors() -> dict[str, Any]:
    """Largest error of each type, and whether chunks and threads change any bit, on this process's instruction set."""
    worst, same = dict.fromkeys(KV_TYPES, 0.0), True
    for kv_type in KV_TYPES:
        for arrays, rule in inputs():
            kernels.set_threads(2)
            found = in_chunks(arrays, rule, kv_type, sizes(1000))
            rounded = [arrays[0], *(reference.kept(each, kv_type) for each in arrays[1:])]
            worst[kv_type] = max(
                worst[kv_type], float(np.abs(found - reference.causal_attention(*rounded, **rule)).max())
            )
            kernels.set_threads(3)
            same = same and np.array_equal(found, in_chunks(arrays, rule, kv_type, sizes(7, 1, 1, 64, 40)))
            kernels.set_threads(1)
            same = same and np.array_equal(found, in_chunks(arrays, rule, kv_type, sizes(1)))
    return {"isa": kernels.isa(), "worst": worst, "same": same, "kept": all(map(kept_exactly, KV_TYPES))}


def kept_exactly(kv_type: str) -> bool:
    """With a window of one position attention gives its value, as the cache keeps it."""
    rng = np.random.default_rng(5)
    values = normal(rng, 40, 2, 75) * np.exp(4 * normal(rng, 40, 2, 1))
    values[3, 0, :40], values[5, 1] = 0, 1e-39
    values[7, 0, 3], values[7, 1, 40], values[8, 0, 2], values[9, 1, 74] = 7e4, -1e30, np.inf, np.nan
    rule = {"window": 1, "softcap": None, "sinks": None}
    found = in_chunks([np.ones_like(values), np.ones_like(values), values], rule, kv_type, sizes(40))
    return np.array_equal(found, reference.kept(values, kv_type), equal_nan=True)


@pytest.mark.parametrize("isa", ["scalar", "neon", "avx2", "avx-vnni", "avx512-vnni"])
def test_kernels_equal_the_reference(isa: str) -> None:
    code = f"import sys, json; sys.path.insert(0, {os.path.dirname(__file__)!r})"
    code += "; import test_attention; print(json.dumps(test_attention.errors()))"
    environment = {**os.environ, "PENJING_ISA": isa, "OPENBLAS_NUM_THREADS": "1"}  # numpy's threads take our cores
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    if "PENJING_ISA" in ran.stderr:
        pytest.skip(f"this machine has no {isa}")
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert found["isa"] == isa
    assert found["same"], "a result depends on what it was computed with"
    assert found["kept"], "the cache does not keep what the reference keeps"
    assert max(found["worst"].values()) < 1e-5, found["worst"]


@pytest.mark.parametrize(("kv_type", "most"), [("int8", 127), ("int4", 8)])
def test_codes_are_near(kv_type: str, most: int) -> None:
    """Half a step of 32 elements, of which bfloat16 keeps 8 bits; at int4's far end, which is one code shorter, one."""
    rng = np.random.default_rng(2)
    x = normal(rng, 500, 64) * np.exp(3 * normal(rng, 500, 1))
    groups = x.reshape(-1, 32)
    step = np.abs(groups).max(axis=1, keepdims=True) / most * (1 + 2**-8)
    off = np.abs(reference.kept(x, kv_type).reshape(-1, 32) - groups)
    shorter = (kv_type == "int4") & (np.abs(groups) > 7 * step)
    assert (off <= np.where(shorter, 1 + 2**-5, 0.5 + 2**-8) * step).all()
    assert np.sqrt((off**2).mean(axis=1, keepdims=True) / step**2).max() < 0.5


def test_the_reference_equals_torch() -> None:
    torch = pytest.importorskip("torch")
    for arrays, rule in inputs():
        if rule["softcap"] or rule["sinks"] is not None:
            continue
        q, k, v = (torch.from_numpy(np.ascontiguousarray(each)).double().swapaxes(0, 1) for each in arrays)
        at = torch.arange(q.shape[1])
        seen = (at <= at[:, None]) & (at > at[:, None] - (rule["window"] or len(at)))
        right = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
        found = reference.causal_attention(*arrays, **rule)
        np.testing.assert_allclose(found, right.swapaxes(0, 1).numpy(), atol=1e-6)
        np.testing.assert_allclose(kernels.causal_attention(*arrays, **rule), found, atol=1e-5)


def test_the_reference_equals_transformers() -> None:
    """Gemma 2's cap and gpt-oss's sinks, as transformers computes them."""
    torch = pytest.importorskip("torch")
    gemma = pytest.importorskip("transformers.models.gemma2.modeling_gemma2")
    oss = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
    rng = np.random.default_rng(4)
    q, k, v, sinks = normal(rng, 20, 6, 8) * 3, normal(rng, 20, 2, 8), normal(rng, 20, 2, 8), normal(rng, 6)
    module = torch.nn.Module()
    module.num_key_value_groups, module.sinks = 3, torch.from_numpy(sinks)
    module.eval()
    heads = [torch.from_numpy(each).swapaxes(0, 1)[None] for each in (q, k, v)]
    mask = torch.full((20, 20), -torch.inf).triu(1)[None, None]
    capped, _ = gemma.eager_attention_forward(module, *heads, mask, scaling=0.5, softcap=2.0)
    sunk, _ = oss.eager_attention_forward(module, *heads, mask, scaling=0.5)
    np.testing.assert_allclose(reference.causal_attention(q, k, v, scale=0.5, softcap=2), capped[0], atol=2e-6)
    np.testing.assert_allclose(reference.causal_attention(q, k, v, scale=0.5, sinks=sinks), sunk[0], atol=2e-6)


def test_sequences_share_a_call_and_the_blocks_of_a_prefix() -> None:
    """Two sequences that begin alike, one that does not, of different lengths, in one call: the bits of each alone."""
    rng = np.random.default_rng(6)
    q, k, v = (normal(rng, 200, heads, 24) for heads in (8, 2, 2))
    rule = {"window": None, "softcap": None, "sinks": None}
    whole = in_chunks([q, k, v], rule, "float16", sizes(200))
    other = in_chunks([q[50:], k[50:], v[50:]], rule, "float16", sizes(150))
    pool = pool_for(k, v, "float16", 20)
    first, second, third = ([9, 1, 4, 0, 12], [9, 1, 4, 17, 3, 8, 7], [5, 6, 11, 10, 2])
    tables = [np.array(each, np.int32) for each in (first, second, third)]
    attend(pool, [(q[:96], k[:96], v[:96], tables[0], 0)], rule)
    chunks = [(q[96:97], k[96:97], v[96:97], tables[0], 96), (q[96:200], k[96:200], v[96:200], tables[1], 96)]
    found = attend(pool, [*chunks, (q[50:170], k[50:170], v[50:170], tables[2], 0)], rule)
    np.testing.assert_array_equal(found[0], whole[96:97])
    np.testing.assert_array_equal(found[1], whole[96:])
    np.testing.assert_array_equal(found[2], other[:120])
    again = attend(pool, [(q[96:200], None, None, tables[1], 96)], rule)  # a layer that reads another's cache
    np.testing.assert_array_equal(again[0], whole[96:])


def test_large_scores_do_not_overflow() -> None:
    queries = np.full((3, 1, 16), 1e3, np.float32)
    keys = np.stack([np.full((1, 16), sign, np.float32) for sign in (1, -1, 1)]) * np.float32(1e3)
    values = np.arange(3 * 16, dtype=np.float32).reshape(3, 1, 16)
    mixed = kernels.causal_attention(queries, keys, values)
    np.testing.assert_allclose(mixed[1], values[0], atol=1e-30)  # the second key is hidden by its score
    np.testing.assert_allclose(mixed[2], (values[0] + values[2]) / 2)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("kv_type", KV_TYPES)
def test_numbers_that_are_none_stay_visible(kv_type: str, bad: float) -> None:
    """In a key or a value they spoil those who see them, and nobody else: not even queries of the same chunk."""
    rng = np.random.default_rng(8)
    rule = {"window": 40, "softcap": None, "sinks": None}
    for which in (1, 2):
        arrays = [normal(rng, 150, heads, 20) for heads in (6, 2, 2)]
        arrays[0] = np.abs(arrays[0])  # an infinite key is then the highest score
        arrays[which][70, 1, 3] = bad
        with np.errstate(invalid="ignore"):
            mixed = in_chunks(arrays, rule, kv_type, sizes(150))
        spoilt = ~np.isfinite(mixed[:, 3:]).all(axis=-1)
        assert np.isfinite(mixed[:, :3]).all()
        assert spoilt[70:110].all()
        assert not np.delete(spoilt, range(70, 110), axis=0).any()


def test_a_query_that_is_none_spoils_itself() -> None:
    rng = np.random.default_rng(9)
    arrays = [normal(rng, 40, heads, 20) for heads in (6, 2, 2)]
    arrays[0][7, 1] = np.nan
    mixed = kernels.causal_attention(*arrays)
    assert np.isnan(mixed[7, 1]).all()
    assert np.isnan(mixed).sum() == 20


def test_blocks_have_the_size_that_is_told() -> None:
    """Keys and values of 32 positions, to the cache line, an odd number of them; 2 bytes a step of 32 elements."""
    bits = {"float32": 32, "float16": 16, "bfloat16": 16, "int8": 8.5, "int4": 4.5}
    for kv_type in KV_TYPES:
        exact = bits[kv_type] / 8 * 32 * (2 * (64 + 64) + 3 * (32 + 128))
        assert 0 <= KvPool.block_bytes([(2, 64, 64), (0, 0, 0), (3, 32, 128)], kv_type) - exact <= 64
    assert KvPool.block_bytes([(1, 64, 64)], "float16") // 64 % 2 == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"queries": (3, 5, 8)}, "multiple of the layer's kv_heads"),
        ({"queries": (3, 4, 9)}, r"queries: give a float32 array \(3, any, 8\)"),
        ({"keys": (2, 2, 8)}, r"keys: give a float32 array \(3, 2, 8\)"),
        ({"values": (3, 2, 4)}, r"values: give a float32 array \(3, 2, 5\)"),
        ({"values": None}, "give both"),
        ({"start": 62}, "too few blocks for positions up to 65"),
        ({"start": -1}, "too few blocks"),
        ({"table": [0, 4]}, "no such block"),
        ({"table": [-1, 1]}, "no such block"),
        ({"layer": 2}, "no such layer"),
        ({"layer": 0}, "keeps no keys"),
        ({"window": -1}, "window"),
        ({"softcap": -1.0}, "softcap"),
        ({"sinks": (3,)}, r"sinks: give a contiguous float32 array \(4\)"),
    ],
)
def test_what_does_not_fit(change: dict[str, Any], message: str) -> None:
    given = {"queries": (3, 4, 8), "keys": (3, 2, 8), "values": (3, 2, 5), "table": [2, 0], "start": 0, "layer": 1}
    given |= change
    zeros = {name: given[name] and np.zeros(given[name], np.float32) for name in ("queries", "keys", "values")}
    sinks = np.zeros(given["sinks"], np.float32) if "sinks" in given else None
    pool = KvPool([(0, 0, 0), (2, 8, 5)], "float32", 4)
    chunk = (*zeros.values(), np.array(given["table"], np.int32), given["start"])
    with pytest.raises(ValueError, match=message):
        pool.attend(given["layer"], [chunk], given.get("window", 0), None, given.get("softcap", 0), sinks)


@pytest.mark.parametrize(
    ("layers", "kv_type", "blocks", "message"),
    [
        ([(1, 8, 8), (1, MAX_KV_DIM + 1, 8)], "int8", 1, "layer 1: key_dim and value_dim are 1 to 576"),
        ([(1, 8, 0)], "int8", 1, "layer 0"),
        ([(-1, 8, 8)], "int8", 1, "layer 0"),
        ([(1, 8, 8)], "int5", 1, "int5 is not known"),
        ([(1, 8, 8)], "int8", -1, "blocks: give 0"),
    ],
)
def test_pools_that_cannot_be(layers: list, kv_type: str, blocks: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KvPool(layers, kv_type, blocks)
