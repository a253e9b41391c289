"""ggml's formats against its authors' package: every bit of what is decoded, and of what it can encode."""

from __future__ import annotations

import numpy as np
import pytest

from penjing.formats import ggml
from penjing.formats.ggml_encode import ENCODED, encode

gguf = pytest.importorskip("gguf")
QUANTIZED = [kind for kind in ggml.KINDS.values() if not kind.is_float]


@pytest.mark.parametrize("kind", QUANTIZED, ids=lambda kind: kind.name)
def test_every_bit_pattern_decodes_as_ggml_does(kind: ggml.Kind) -> None:
    random = np.random.default_rng(0)
    raw = random.integers(0, 256, (7, 3 * kind.layout.itemsize), dtype=np.uint8)
    blocks = raw.reshape(-1, kind.layout.itemsize).view(kind.layout)[:, 0]
    for field in {"d", "m"} & set(kind.layout.names):
        blocks[field] = random.standard_normal(len(blocks)) * 0.01
    right = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType(kind.number))
    np.testing.assert_array_equal(ggml.decode(kind, raw), right)


@pytest.mark.parametrize("name", ["f16", "bf16", "q4_0", "q4_1", "q5_0", "q8_0"])
def test_encodes_as_ggml_does(name: str) -> None:
    weight = np.random.default_rng(0).standard_normal((5, 96)).astype(np.float32)
    weight[3] = 0
    right = gguf.quants.quantize(weight, gguf.GGMLQuantizationType(ggml.KINDS[name].number))
    np.testing.assert_array_equal(encode(ggml.KINDS[name], weight), right.view(np.uint8).reshape(5, -1))


@pytest.mark.parametrize(("name", "limit"), [("q4_k", 0.075), ("q5_k", 0.038), ("q6_k", 0.019)])
def test_k_formats_lose_no_more_than_their_bits(name: str, limit: float) -> None:
    assert name in ENCODED
    weight = np.random.default_rng(0).standard_normal((9, 512)).astype(np.float32)
    weight[4] = 0
    back = ggml.decode(ggml.KINDS[name], encode(ggml.KINDS[name], weight))
    assert np.sqrt(np.square(back - weight).mean() / np.square(weight).mean()) < limit
    assert not back[4].any()
