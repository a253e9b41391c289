"""GPTQ's and AWQ's packing, written here bit by bit as their papers' tools do it, and read back."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from penjing.checkpoint import open_checkpoint, qweight, write_safetensors
from penjing.errors import BadCheckpoint, Unsupported
from penjing.formats.affine import AffineTensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from packing import awq_rows, packed_rows

ROWS, COLUMNS = 32, 96


def pack(kind: str, bits: int, group: int, *, symmetric: bool, scattered: bool = False) -> tuple[dict[str, Any], Any]:
    """A random weight's tensors, and its numbers (out, in)."""
    random = np.random.default_rng(bits)
    count = COLUMNS // group
    groups = np.arange(COLUMNS) // group
    if scattered:
        groups = random.permutation(groups)
    codes = random.integers(0, 2**bits, (ROWS, COLUMNS))
    zeros = np.full((ROWS, count), 2 ** (bits - 1)) if symmetric else random.integers(1, 2**bits, (ROWS, count))
    scales = random.uniform(0.01, 0.1, (ROWS, count)).astype(np.float16)
    right = (codes - zeros[:, groups]) * scales.astype(np.float64)[:, groups]
    if kind == "awq":
        parts = {"qweight": awq_rows(codes.T), "qzeros": awq_rows(zeros.T)}
    else:
        stored = zeros.T - (kind == "gptq")
        parts = {"qweight": packed_rows(codes, bits).T, "qzeros": packed_rows(stored, bits)}
        parts["g_idx"] = groups.astype(np.int32)
    return parts | {"scales": np.ascontiguousarray(scales.T)}, right


CASES = [(kind, bits) for kind in ("gptq", "gptq_v2") for bits in (2, 3, 4, 8)] + [("awq", 4)]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, 96])
@pytest.mark.parametrize(("kind", "bits"), CASES)
def test_codes_stay_the_same(kind: str, bits: int, group: int, symmetric: bool) -> None:
    parts, right = pack(kind, bits, group, symmetric=symmetric)
    found = qweight.decode(parts, kind, "here")
    assert isinstance(found, AffineTensor)
    assert (found.grid.bits, found.grid.symmetric, found.grid.scale_dtype) == (bits, symmetric, "float16")
    assert found.grid.group_size == (-1 if group == COLUMNS else group)
    np.testing.assert_array_equal(found.decode(), right)


@pytest.mark.parametrize("bits", [3, 4])
def test_scattered_groups_are_floats_and_the_same_numbers(bits: int) -> None:
    parts, right = pack("gptq", bits, 32, symmetric=False, scattered=True)
    found = qweight.decode(parts, "gptq", "here")
    assert isinstance(found, np.ndarray)
    np.testing.assert_array_equal(found, right)


def test_a_zero_point_of_zero_borrows_from_its_word_as_gptqmodel_writes_it() -> None:
    parts, _ = pack("gptq_v2", 4, 96, symmetric=False)
    parts["qzeros"] = packed_rows(np.tile([[0, 5, 0, 15]], ROWS // 4), 4)
    right = qweight.decode(parts, "gptq_v2", "here")
    less = (parts["qzeros"].view(np.uint32) - np.uint32(0x11111111)).view(np.int32)
    found = qweight.decode(parts | {"qzeros": less}, "gptq", "here")
    assert isinstance(found, AffineTensor)
    assert isinstance(right, AffineTensor)
    np.testing.assert_array_equal(found.decode(), right.decode())


def test_tensors_that_do_not_fit_are_one_line() -> None:
    parts, _ = pack("gptq", 4, 32, symmetric=True)
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"qzeros": parts["qzeros"][:2]}, BadCheckpoint, "do not fit one another"),
        ({"qweight": parts["qweight"][:-1]}, BadCheckpoint, "do not fit one another"),
        ({"qweight": parts["qweight"].astype(np.int64)}, BadCheckpoint, "expected a matrix of int32"),
        ({"scales": parts["scales"][0]}, BadCheckpoint, "expected a matrix of float32 or bfloat16 or float16"),
        ({"g_idx": np.full(COLUMNS, 3, np.int32)}, BadCheckpoint, "which of 3 groups"),
        ({"qzeros": np.zeros((3, 5), np.int32)}, Unsupported, "5 bits"),
    ]
    for change, error, message in cases:
        with pytest.raises(error, match=message) as caught:
            qweight.decode(parts | change, "gptq", "here: X")
        assert str(caught.value).startswith("here: X")
    with pytest.raises(BadCheckpoint, match="scales is missing"):
        qweight.decode({name: parts[name] for name in ("qweight", "qzeros")}, "gptq", "here")


CONFIGS = [
    (
        {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"},
        "'marlin'; Penjing reads gptq, gptq_v2 and",
    ),
    ({"quant_method": "gptq", "bits": 4, "is_marlin_format": True}, "layout 'gptq'"),
    ({"quant_method": "gptq", "bits": 5}, "bits = 5; Penjing reads 2, 3, 4, 8"),
    ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "'gemv'"),
    ({"quant_method": "awq", "bits": 3, "version": "GEMM"}, "bits = 3; Penjing reads 4"),
    ({"quant_method": "gptq", "bits": 4, "group_size": "all"}, "group_size = 'all'"),
]


@pytest.mark.parametrize(("config", "message"), CONFIGS)
def test_layouts_that_are_not_read_are_named(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    parts, _ = pack("gptq", 4, 32, symmetric=True)
    write_safetensors(tmp_path / "model.safetensors", {f"a.{name}": array for name, array in parts.items()})
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": config}))
    with pytest.raises((Unsupported, BadCheckpoint), match=message):
        open_checkpoint(tmp_path)
