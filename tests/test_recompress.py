"""Models that others quantized: computed on as they are, and compressed again, which is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from packing import packed_llama
from penjing import compress
from penjing.checkpoint import open_checkpoint, write_safetensors
from penjing.checkpoint.describe import describe
from penjing.errors import BadCheckpoint, Unsupported
from penjing.export import export
from penjing.models import Chunk, load
from tiny_llama import CONFIG, llama_tensors, make_model


def logits(folder: Path) -> Any:
    model = load(folder, activations="float")
    model.reserve(4, "float32", 1)
    ids = np.arange(2, 22, dtype=np.int32)
    return model.logits([Chunk(ids, 0, np.arange(4, dtype=np.int32), 0)])[0]


WAYS = {"gptq": ("gptq", False), "desc_act": ("gptq", True), "awq": ("awq", False)}


@pytest.mark.parametrize("way", WAYS)
def test_a_quantized_model_computes_what_its_numbers_say(way: str, tmp_path: Path) -> None:
    method, scattered = WAYS[way]
    folder, plain = packed_llama(tmp_path / "q", method, scattered=scattered)
    checkpoint = open_checkpoint(folder)
    assert set(checkpoint.names) == set(plain)
    for name in plain:
        np.testing.assert_array_equal(checkpoint.tensor(name), plain[name])
    np.testing.assert_allclose(logits(folder), logits(make_model(tmp_path / "p", plain)), atol=2e-3)
    assert [("3 weights" in note, "desc_act" in note) for note in checkpoint.notes] == [(True, True)] * scattered
    summary = describe(folder)
    assert summary.parameters == sum(array.size for array in plain.values())
    assert summary.format == f"int4 g32 asymmetric {method}"


@pytest.mark.parametrize("way", WAYS)
def test_compressed_again_it_is_what_its_numbers_become(way: str, tmp_path: Path) -> None:
    method, scattered = WAYS[way]
    folder, plain = packed_llama(tmp_path / "q", method, scattered=scattered)
    right = compress(make_model(tmp_path / "p", plain), tmp_path / "a", bits=4, group_size=16, check="full")
    said: list[str] = []
    found = compress(folder, tmp_path / "b", bits=4, group_size=16, check="full", announce=said.append, shard_bytes=1)
    assert sum("compressed already (int4 g32 asymmetric" in line for line in said) == 1
    first, again = open_checkpoint(right.output), open_checkpoint(found.output)
    for name in plain:
        np.testing.assert_array_equal(first.tensor(name), again.tensor(name))
    assert not (tmp_path / "b" / "quantize_config.json").exists()
    assert again.config["quantization_config"]["quant_method"] == "compressed-tensors"


FIRST: dict[str, dict[str, Any]] = {
    "int4": {"bits": 4, "group_size": 32},
    "asymmetric": {"bits": 3, "group_size": 16, "symmetric": False},
    "w8a8": {"bits": 8, "group_size": -1, "activations": "int8"},
    "pruned": {"sparsity": 0.5, "sparse_storage": "bitmask"},
    "joint": {"bits": 4, "group_size": 32, "sparsity": 0.5, "sparse_storage": "bitmask"},
}


@pytest.mark.parametrize("first", FIRST)
def test_what_penjing_made_is_compressed_again_from_its_numbers(first: str, tmp_path: Path) -> None:
    made = compress(make_model(tmp_path / "m", llama_tensors(np.float32)), tmp_path / "a", **FIRST[first]).output
    saved = open_checkpoint(made)
    numbers = {name: saved.tensor(name).astype(np.float32) for name in saved.names}
    said: list[str] = []
    again = compress(made, tmp_path / "b", bits=4, group_size=16, announce=said.append)
    right = compress(make_model(tmp_path / "p", numbers), tmp_path / "c", bits=4, group_size=16)
    assert sum("compressed already" in line for line in said) == 1
    ours, plain = open_checkpoint(again.output), open_checkpoint(right.output)
    for name in numbers:
        np.testing.assert_array_equal(ours.tensor(name), plain.tensor(name))


def test_steps_stay_as_narrow_as_they_were(tmp_path: Path) -> None:
    made = compress(make_model(tmp_path / "m"), tmp_path / "a", bits=8, group_size=32).output
    again = open_checkpoint(compress(made, tmp_path / "b", bits=4, group_size=32).output)
    assert again.infos["model.layers.0.mlp.up_proj.weight_scale"].dtype.name == "bfloat16"


def test_calibration_reads_it_too(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    novelist = Path(__file__).parents[1] / "examples" / "novelist"
    made = compress(novelist, tmp_path / "a", bits=8, group_size=32, check="none").output
    text = novelist / "evaluation.txt"
    found = compress(
        made, tmp_path / "b", method="gptq", bits=4, group_size=32, calibration=[text], samples=2, sequence_length=64
    )
    assert found.calibration is not None
    assert "agree" in found.check["verdict"]


def test_a_gguf_is_said_to_be_compressed_already(tmp_path: Path) -> None:
    novelist = Path(__file__).parents[1] / "examples" / "novelist"
    export(novelist, tmp_path / "n.gguf", "gguf", "q4_k")
    said: list[str] = []
    compress(tmp_path / "n.gguf", tmp_path / "b", bits=4, group_size=32, check="none", announce=said.append)
    assert sum("compressed already (GGUF" in line for line in said) == 1


def test_exports_of_a_quantized_model(tmp_path: Path) -> None:
    folder, plain = packed_llama(tmp_path / "q", "gptq")
    (folder / "tokenizer.json").unlink()
    export(folder, tmp_path / "q.gguf", "gguf")
    file = open_checkpoint(tmp_path / "q.gguf")
    down = "model.layers.1.mlp.down_proj.weight"
    np.testing.assert_allclose(file.tensor(down), plain[down], atol=1e-3)  # offsets are rounded to float16
    with pytest.raises(Unsupported, match="read its format as it is"):
        export(folder, tmp_path / "x")


def test_a_module_without_its_steps_is_one_line(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "model.safetensors", {"a.qweight": np.zeros((4, 32), np.int32)})
    config = CONFIG | {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadCheckpoint, match=r"a\.qzeros is missing"):
        open_checkpoint(tmp_path).weight("a")
    with pytest.raises(BadCheckpoint, match=r"embed_tokens\.weight is missing"):
        compress(tmp_path, tmp_path / "out", bits=4, group_size=4)
    with pytest.raises(BadCheckpoint, match="are missing"):
        describe(tmp_path)
