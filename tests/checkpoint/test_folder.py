"""Folders: shards and index agree, and compressed weights decode to what compressed-tensors decodes them to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from penjing.checkpoint import open_checkpoint, storage, write_safetensors
from penjing.errors import BadCheckpoint, Unsupported
from penjing.formats import affine
from penjing.formats.affine import AffineTensor, Grid
from penjing.formats.bitmask import BitmaskTensor

NOVELIST = Path(__file__).parents[2] / "examples" / "novelist"


def make_folder(path: Path, shards: dict[str, dict[str, np.ndarray]], config: dict[str, Any] | None = None) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config or {"model_type": "llama"}))
    for name, tensors in shards.items():
        write_safetensors(path / name, tensors)
    if len(shards) > 1:
        places = {tensor: name for name, tensors in shards.items() for tensor in tensors}
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return path


def two_shards(path: Path) -> Path:
    a, b = np.ones((2, 3), np.float32), np.zeros(4, np.float16)
    return make_folder(path, {"model-1.safetensors": {"a.weight": a}, "model-2.safetensors": {"b.weight": b}})


def test_real_checkpoint_has_the_tensors_that_safetensors_finds() -> None:
    safe_open = pytest.importorskip("safetensors").safe_open
    checkpoint = open_checkpoint(NOVELIST)
    with safe_open(NOVELIST / "model.safetensors", "numpy") as file:
        assert set(checkpoint.names) == set(file.keys())
    assert checkpoint.weight("model.layers.0.mlp.down_proj").shape == (384, 1024)
    assert checkpoint.activations("model.layers.0.mlp.down_proj") == "float"
    assert set(checkpoint.side_files) >= {"tokenizer.json", "generation_config.json"}


def test_shards(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(two_shards(tmp_path))
    assert checkpoint.names == ("a.weight", "b.weight")
    assert checkpoint.tensor("b.weight").dtype == np.float16
    assert checkpoint.file_of("b.weight").name == "model-2.safetensors"


def _unlink(folder: Path, name: str) -> None:
    (folder / name).unlink()


def _edit_index(folder: Path, places: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


BAD_FOLDERS = {
    "missing shard": (lambda f: _unlink(f, "model-2.safetensors"), "shard model-2.safetensors is missing"),
    "no index": (lambda f: _unlink(f, "model.safetensors.index.json"), "2 safetensors files and no"),
    "no config": (lambda f: _unlink(f, "config.json"), "config.json is missing"),
    "broken config": (lambda f: (f / "config.json").write_text('{"a": 1,\n'), "line 2 column 1"),
    "config without end": (lambda f: (f / "config.json").write_text("[" * 200_000), "nested too deeply"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "not an object"),
    "tensor not in its shard": (
        lambda f: _edit_index(f, {"a.weight": "model-2.safetensors", "b.weight": "model-2.safetensors"}),
        "tensor a.weight is missing",
    ),
    "tensor not in the index": (
        lambda f: (
            _edit_index(f, {"b.weight": "model-2.safetensors", "a.weight": "model-1.safetensors"}),
            write_safetensors(f / "model-1.safetensors", {"a.weight": np.ones(1), "c": np.ones(1)}),
        ),
        "tensor c is not in",
    ),
    "path outside": (lambda f: _edit_index(f, {"a.weight": "../x.safetensors"}), "not the name of a file"),
    "index without a map": (lambda f: _edit_index(f, None), "needs weight_map"),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_bad_folders_are_refused_in_one_line(case: str, tmp_path: Path) -> None:
    spoil, message = BAD_FOLDERS[case]
    spoil(two_shards(tmp_path))
    with pytest.raises(BadCheckpoint, match=message) as caught:
        open_checkpoint(tmp_path)
    assert "\n" not in str(caught.value)


def test_what_is_not_a_checkpoint_folder(tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint, match="no such folder"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(BadCheckpoint, match="give the folder"):
        open_checkpoint(NOVELIST / "config.json")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BadCheckpoint, match="no weights"):
        open_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(BadCheckpoint, match="no checkpoint of torch's"):
        open_checkpoint(tmp_path)


def quantization(layout: str, weights: dict[str, Any], inputs: dict[str, Any] | None = None) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def library_parts(
    weight: np.ndarray, layout: str, weights: dict[str, Any]
) -> tuple[dict[str, np.ndarray], np.ndarray, dict[str, Any]]:
    """A weight compressed by compressed-tensors → its parts, what the library decodes them to, the scheme used."""
    torch = pytest.importorskip("torch")
    ct = pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    assert ct.__version__
    args = QuantizationArgs(**weights)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    tensor = torch.from_numpy(weight)
    columns = weight.shape[1] if args.group_size in (None, -1) else args.group_size
    grouped = tensor.reshape(-1) if args.strategy == "tensor" else tensor.reshape(weight.shape[0], -1, columns)
    scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args)
    state = {"weight": tensor, "weight_scale": scale.float(), "weight_zero_point": zero}
    compressor = BaseCompressor.get_value_from_registry(layout)
    compressed = compressor.compress(state, scheme)
    decoded = compressor.decompress(compressed, scheme)["weight"]
    return {name: value.numpy() for name, value in compressed.items()}, decoded.float().numpy(), weights


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("group_size", [8, 32, -1])
def test_pack_quantized_decodes_as_compressed_tensors_does(
    bits: int, group_size: int, symmetric: bool, tmp_path: Path
) -> None:
    weight = np.random.default_rng(bits).standard_normal((13, 96)).astype(np.float32)
    strategy = "channel" if group_size == -1 else "group"
    weights = {
        "num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy, "group_size": group_size,
    }  # fmt: skip
    parts, expected, scheme = library_parts(weight, "pack-quantized", weights)
    config = {"quantization_config": quantization("pack-quantized", scheme)}
    tensors = {f"x.{name}": value for name, value in parts.items()}
    checkpoint = open_checkpoint(make_folder(tmp_path, {"model.safetensors": tensors}, config))
    assert checkpoint.names == ("x.weight",)
    back = checkpoint.weight("x")
    assert isinstance(back, AffineTensor)
    assert (back.grid.bits, back.grid.symmetric, back.grid.group_size) == (bits, symmetric, group_size)
    np.testing.assert_allclose(back.decode(), expected, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(checkpoint.tensor("x.weight"), back.decode())


@pytest.mark.parametrize("strategy", ["channel", "tensor"])
def test_int_quantized_decodes_as_compressed_tensors_does(strategy: str, tmp_path: Path) -> None:
    weight = np.random.default_rng(3).standard_normal((6, 40)).astype(np.float32)
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": strategy}
    parts, expected, scheme = library_parts(weight, "int-quantized", weights)
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    config = {"quantization_config": quantization("int-quantized", scheme, inputs)}
    tensors = {f"x.{name}": value for name, value in parts.items()}
    checkpoint = open_checkpoint(make_folder(tmp_path, {"model.safetensors": tensors}, config))
    assert checkpoint.activations("x") == "int8"
    np.testing.assert_allclose(checkpoint.tensor("x.weight"), expected, rtol=1e-6)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_bitmask_of_codes_comes_back(bits: int, symmetric: bool, tmp_path: Path) -> None:
    grid = Grid(bits, 8, symmetric, "bfloat16")
    random = np.random.default_rng(4)
    weight = random.standard_normal((5, 24)).astype(np.float32) * (random.random((5, 24)) < 0.5)
    scale, zero = affine.fit(*affine.ranges(weight, grid), grid)
    tensor = AffineTensor(affine.encode(weight, scale, zero, grid), scale, zero, grid)
    stored = {f"x.{name}": value for name, value in storage.encode_packed(tensor, sparse=True).items()}
    group = {
        "num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": 8,
    }  # fmt: skip
    config = {"quantization_config": quantization("pack-quantized", group)}
    back = open_checkpoint(make_folder(tmp_path, {"model.safetensors": stored}, config)).weight("x")
    assert isinstance(back, AffineTensor)
    np.testing.assert_array_equal(back.codes, tensor.codes)
    np.testing.assert_array_equal(back.decode(), tensor.decode())


def test_bitmask_of_floats_comes_back(tmp_path: Path) -> None:
    random = np.random.default_rng(5)
    weight = (random.standard_normal((7, 19)) * (random.random((7, 19)) < 0.4)).astype(ml_dtypes.bfloat16)
    stored = {f"x.{name}": value for name, value in storage.encode_sparse(weight).items()}
    checkpoint = open_checkpoint(make_folder(tmp_path, {"model.safetensors": stored}))
    back = checkpoint.weight("x")
    assert isinstance(back, BitmaskTensor)
    np.testing.assert_array_equal(back.decode().astype(np.float32), weight.astype(np.float32))
    assert checkpoint.tensor("x.weight").dtype == ml_dtypes.bfloat16


GROUP = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 8}


def packed_folder(path: Path, drop: str = "", **changes: np.ndarray) -> Path:
    grid = Grid(4, 8, symmetric=False)
    weight = np.random.default_rng(6).standard_normal((8, 16)).astype(np.float32)
    scale, zero = affine.fit(*affine.ranges(weight, grid), grid)
    tensor = AffineTensor(affine.encode(weight, scale, zero, grid), scale, zero, grid)
    parts = storage.encode_packed(tensor) | changes
    parts.pop(drop, None)
    config = {"quantization_config": quantization("pack-quantized", GROUP)}
    return make_folder(path, {"model.safetensors": {f"x.{k}": v for k, v in parts.items()}}, config)


BAD_PARTS: dict[str, tuple[dict[str, Any], str]] = {
    "no scale": ({"drop": "weight_scale"}, "weight_scale is missing"),
    "no zero point": ({"drop": "weight_zero_point"}, "weight_zero_point is missing"),
    "no shape": ({"drop": "weight_shape"}, "weight_shape is missing"),
    "NaN scale": ({"weight_scale": np.full((8, 2), np.nan, np.float32)}, "NaN"),
    "scale of another shape": (
        {"weight_scale": np.ones((8, 3), np.float32)},
        r"has shape \(8, 3\), the weight calls for \(8, 2\)",
    ),
    "scale of another dtype": ({"weight_scale": np.ones((8, 2), np.int32)}, "dtype int32"),
    "codes of another shape": ({"weight_packed": np.zeros((8, 3), np.int32)}, r"weight_packed has shape \(8, 3\)"),
    "codes of another dtype": (
        {"weight_packed": np.zeros((8, 2), np.int16)},
        "weight_packed has dtype int16; int32 is right",
    ),
}


@pytest.mark.parametrize("case", BAD_PARTS)
def test_bad_parts_are_refused_by_name(case: str, tmp_path: Path) -> None:
    changes, message = BAD_PARTS[case]
    checkpoint = open_checkpoint(packed_folder(tmp_path, **changes))
    with pytest.raises(BadCheckpoint, match=message) as caught:
        checkpoint.weight("x")
    assert ": tensor x.weight" in str(caught.value)


def test_other_quantizations_are_refused_by_name(tmp_path: Path) -> None:
    folder = packed_folder(tmp_path / "a")
    config = json.loads((folder / "config.json").read_text())
    for change, message in [
        ({"quant_method": "bitsandbytes"}, "'bitsandbytes'; Penjing reads compressed-tensors, gptq and awq"),
        ({"format": "mxfp8-quantized"}, "mxfp8"),
        ({"format": "nvfp4-pack-quantized"}, "nvfp4-pack-quantized of type 'int'"),
        ({"config_groups": {"g": {"targets": ["Linear"], "weights": {**GROUP, "type": "float"}}}}, "'float'"),
        ({"config_groups": {"g": {"targets": ["Linear"], "weights": {**GROUP, "strategy": "block"}}}}, "'block'"),
    ]:
        copy = tmp_path / "b"
        shutil.copytree(folder, copy, dirs_exist_ok=True)
        changed = {"quantization_config": {**config["quantization_config"], **change}}
        (copy / "config.json").write_text(json.dumps(changed))
        with pytest.raises(Unsupported, match=message):
            open_checkpoint(copy)


def test_a_module_that_no_group_targets(tmp_path: Path) -> None:
    folder = packed_folder(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["targets"] = ["re:.*down_proj"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadCheckpoint, match="x is stored quantized, but no group"):
        open_checkpoint(folder).weight("x")
