"""The streamed compressor, against the weights it started from, other readers, kill -9 and bad input."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import penjing
from calibrate_models import make
from penjing.checkpoint import open_checkpoint, read_safetensors, storage
from penjing.compress import compress
from penjing.errors import BadCheckpoint, BadInput, BadRecipe, PenjingError
from penjing.formats import affine
from penjing.formats.affine import AffineTensor, Grid
from penjing.kernels import reference
from tiny_llama import NOVELIST, command, llama_tensors, make_model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model(tmp_path / "model")


def test_every_targeted_weight_is_the_nearest_on_its_grid(model: Path, tmp_path: Path) -> None:
    result = compress(model, tmp_path / "out", bits=4, group_size=32, symmetric=False)
    source, saved = open_checkpoint(model), open_checkpoint(tmp_path / "out")
    assert set(saved.names) == set(source.names)
    quantized = 0
    for name in source.names:
        original = source.tensor(name)
        if "layers" not in name or original.ndim == 1:
            np.testing.assert_array_equal(saved.tensor(name), original)
            continue
        weight = saved.weight(name.removesuffix(".weight"))
        assert isinstance(weight, AffineTensor)
        expected = reference.quantize(original, Grid(4, 32, False, "bfloat16"))
        np.testing.assert_array_equal(weight.codes, expected.codes)
        np.testing.assert_array_equal(weight.scale, expected.scale)
        np.testing.assert_array_equal(weight.zero_point, expected.zero_point)
        quantized += 1
    assert quantized == 21
    assert result.check["modules"] == 21
    assert result.check["blocks"] == [0, 1, 2]
    assert result.check["logits_error"] < 1e-5


def test_what_is_reported_is_what_is_on_the_disk(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = compress(model, out, "int4", group_size=32, shard_bytes=1)
    files = sorted(out.glob("*.safetensors"))
    assert len(files) == 5  # before, three layers, after
    assert result.blocks == 3
    assert result.size_bytes == sum(file.stat().st_size for file in files)
    lines = "".join(f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in files)
    assert result.digest == hashlib.sha256(lines.encode()).hexdigest()
    noted = json.loads((out / "penjing.json").read_text())
    assert noted["digest"] == result.digest
    assert noted["recipe"]["rules"][0]["quantize"]["group_size"] == 32
    assert len(noted["resolved"]["modules"]) == 21
    assert noted["resolved"]["left_as_is"] == ["model.embed_tokens.weight", "lm_head.weight"]
    assert (out / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    assert not (out / ".journal").exists()
    tensors = {name: info.nbytes for name, info in open_checkpoint(out).infos.items()}
    parameters = sum(tensor.size for tensor in llama_tensors().values())
    assert result.bits_per_weight == pytest.approx(8 * sum(tensors.values()) / parameters)
    # 4 bits a code, a bfloat16 step for 32 of them, and weight_shape
    weights = sum(t.size for name, t in llama_tensors().items() if "layers" in name and t.ndim == 2)
    assert result.target_bits_per_weight == pytest.approx(4 + 16 / 32 + 21 * 16 * 8 / weights)


def test_one_file_or_many_hold_the_same_tensors(model: Path, tmp_path: Path) -> None:
    compress(model, tmp_path / "one", "int4", group_size=32)
    compress(model, tmp_path / "many", "int4", group_size=32, shard_bytes=1)
    assert [file.name for file in (tmp_path / "one").glob("*.safetensors")] == ["model.safetensors"]
    assert not (tmp_path / "one" / "model.safetensors.index.json").exists()
    one, many = open_checkpoint(tmp_path / "one"), open_checkpoint(tmp_path / "many")
    assert one.infos.keys() == many.infos.keys()
    for name in one.infos:
        assert one.read(name).tobytes() == many.read(name).tobytes()


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_weights_of_any_float_keep_their_dtype_in_the_steps(dtype: Any, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", llama_tensors(dtype))
    compress(model, tmp_path / "out", "int4", group_size=32)
    saved = open_checkpoint(tmp_path / "out")
    assert saved.infos["model.layers.0.mlp.up_proj.weight_scale"].dtype == dtype
    assert saved.infos["model.embed_tokens.weight"].dtype == dtype


def test_w8a8_is_stored_as_int8_and_says_so(model: Path, tmp_path: Path) -> None:
    result = compress(model, tmp_path / "out", "w8a8")
    saved = open_checkpoint(tmp_path / "out")
    assert saved.infos["model.layers.0.mlp.up_proj.weight"].dtype == np.int8
    assert saved.activations("model.layers.0.mlp.up_proj") == "int8"
    assert saved.config["quantization_config"]["format"] == "int-quantized"
    assert result.check["logits_error"] < 5e-2


@pytest.mark.parametrize("recipe", ["sparse50", "int4-sparse50", "int8-sparse60"])
def test_bitmask_is_smaller_and_the_same_numbers(recipe: str, model: Path, tmp_path: Path) -> None:
    settings = {} if recipe == "sparse50" else {"group_size": 32}
    dense = compress(model, tmp_path / "dense", recipe, **settings)
    sparse = compress(model, tmp_path / "bitmask", recipe, sparse_storage="bitmask", **settings)
    assert sparse.target_bits_per_weight < dense.target_bits_per_weight
    assert dense.sparsity == sparse.sparsity
    assert sparse.sparsity >= int(recipe[-2:]) / 100 - 0.01
    one, other = open_checkpoint(tmp_path / "dense"), open_checkpoint(tmp_path / "bitmask")
    assert one.names == other.names or set(one.names) == set(other.names)
    for name in one.names:
        np.testing.assert_array_equal(one.tensor(name).astype(np.float32), other.tensor(name).astype(np.float32))
    assert other.config["quantization_config"]["quant_method"] == "penjing"
    with pytest.raises(BadRecipe, match="prunes nothing"):
        compress(model, tmp_path / "x", "int4", group_size=32, sparse_storage="bitmask")


def test_pruned_only_needs_no_quantization_config(model: Path, tmp_path: Path) -> None:
    compress(model, tmp_path / "out", sparsity=0.5, scope="tensor")
    saved = open_checkpoint(tmp_path / "out")
    assert "quantization_config" not in saved.config
    weight = saved.tensor("model.layers.1.mlp.up_proj.weight")
    assert (weight == 0).sum() == weight.size // 2


def test_different_settings_for_different_modules(model: Path, tmp_path: Path) -> None:
    rules = [
        {"targets": "*.down_proj", "quantize": {"bits": 8, "group_size": -1}},
        {"targets": "*.layers.1.*"},
        {"targets": "*", "quantize": {"bits": 4, "group_size": 32}},
    ]
    compress(model, tmp_path / "out", {"version": 1, "rules": rules})
    saved = open_checkpoint(tmp_path / "out")
    assert saved.scheme("model.layers.0.mlp.down_proj").grid.bits == 8
    assert saved.scheme("model.layers.0.mlp.up_proj").grid.bits == 4
    assert isinstance(saved.weight("model.layers.1.mlp.up_proj"), np.ndarray)
    assert "model.layers.1.mlp.up_proj" in saved.config["quantization_config"]["ignore"]


def test_large_matrices_are_solved_in_parts_with_the_same_bytes(model: Path, tmp_path: Path) -> None:
    whole = compress(model, tmp_path / "whole", "int4-sparse50", group_size=32)
    small = subprocess.run(
        [sys.executable, "-c", PARTS, str(model), str(tmp_path / "parts")], capture_output=True, text=True, check=True
    )
    assert small.stdout.strip() == whole.digest


PARTS = """
import sys, penjing, penjing.footprint as footprint
footprint.CHUNK_BYTES = 1000 ; footprint.SMALLEST_CHUNK = 1
print(penjing.compress(sys.argv[1], sys.argv[2], "int4-sparse50", group_size=32).digest)
"""


def test_same_command_twice_says_it_is_done(model: Path, tmp_path: Path) -> None:
    first = compress(model, tmp_path / "out", "int4", group_size=32)
    stamps = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()}
    second = penjing.compress(model, tmp_path / "out", "int4", group_size=32)
    assert second.already_done
    assert not first.already_done
    assert (second.digest, second.bits_per_weight, second.resumed_at_block) == (
        first.digest,
        first.bits_per_weight,
        None,
    )
    assert stamps == {file: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()}
    with pytest.raises(BadInput, match="another finished model"):
        compress(model, tmp_path / "out", "int8")
    assert compress(model, tmp_path / "out", "int8", restart=True).digest != first.digest


def stop_after(shards: int, model: Path, out: Path, **settings: Any) -> None:
    """Stop a run, by an exception, when it has reported that many files."""
    reports = 0

    def progress(done: float, total: float) -> None:
        nonlocal reports
        reports += 1
        if reports == shards:
            raise KeyboardInterrupt

    with pytest.raises(PenjingError, match="the same command goes on from there"):
        compress(model, out, shard_bytes=1, progress=progress, **settings)


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_interrupted_run_goes_on_where_it_was(shards: int, model: Path, tmp_path: Path) -> None:
    whole = compress(model, tmp_path / "whole", "int4", group_size=32, shard_bytes=1)
    out = tmp_path / "out"
    stop_after(shards, model, out, recipe="int4", group_size=32)
    assert not (out / "config.json").exists()
    with pytest.raises(BadCheckpoint, match="was not finished"):
        open_checkpoint(out)
    written = {file.name: file.stat().st_mtime_ns for file in out.glob("*.safetensors")}
    rest = compress(model, out, "int4", group_size=32, shard_bytes=1)
    assert rest.resumed_at_block == len(written) - 1  # the first file holds the embedding
    assert rest.digest == whole.digest
    for name, stamp in written.items():
        assert (out / name).stat().st_mtime_ns == stamp
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (out / file.name).read_bytes()


def test_a_run_is_not_continued_as_another(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    stop_after(2, model, out, recipe="int4", group_size=32)
    with pytest.raises(BadInput, match=r"unfinished run with another recipe.*--restart"):
        compress(model, out, "int4", group_size=16, shard_bytes=1)
    changed = llama_tensors()
    changed["model.layers.2.mlp.up_proj.weight"][0, 0] += 1
    with pytest.raises(BadInput, match="another model"):
        compress(make_model(tmp_path / "other", changed), out, "int4", group_size=32, shard_bytes=1)
    (out / "notes.txt").write_text("mine")
    result = compress(model, out, "int4", group_size=16, shard_bytes=1, restart=True)
    assert result.resumed_at_block is None
    assert (out / "notes.txt").read_text() == "mine"


def test_a_damaged_finished_file_is_noticed(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    stop_after(3, model, out, recipe="int4", group_size=32)
    victim = min(out.glob("*.safetensors"))
    raw = bytearray(victim.read_bytes())
    raw[-1] ^= 1
    victim.write_bytes(raw)
    with pytest.raises(PenjingError, match="damaged since it was written"):
        compress(model, out, "int4", group_size=32, shard_bytes=1)


def test_kill_9_at_any_moment_ends_with_the_same_bytes(tmp_path: Path) -> None:
    flags: dict[str, Any] = {"bits": 4, "group_size": 32, "sparsity": 0.5, "shard_bytes": 1}
    start = time.monotonic()
    whole = compress(NOVELIST, tmp_path / "whole", **flags)
    took = time.monotonic() - start
    random = np.random.default_rng(int.from_bytes(os.urandom(4), "little"))
    out, killed, resumed = tmp_path / "out", 0, []
    for attempt in range(40):
        child = subprocess.Popen(command(NOVELIST, out, "--json"), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            said, errors = child.communicate(timeout=0.3 + took * random.random() if attempt < 12 else 60)
            break
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGKILL)
            child.communicate()
            killed += 1
            assert not (out / "config.json").exists() or (out / "penjing.json").exists()
    assert child.returncode == 0, errors
    answer = json.loads(said)
    resumed.append(answer["resumed_at_block"])
    assert answer["digest"] == whole.digest
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (out / file.name).read_bytes(), file.name
    assert {file.name for file in out.iterdir()} == {file.name for file in (tmp_path / "whole").iterdir()}


def test_ctrl_c_is_one_line_and_exit_1(tmp_path: Path) -> None:
    out = tmp_path / "out"
    child = subprocess.Popen(
        command(NOVELIST, out),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    while not (out / ".journal").exists() and child.poll() is None:
        time.sleep(0.005)
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 1
    said = [line for line in errors.decode().splitlines() if not line.startswith(("memory: at most", "sparse: "))]
    assert len(said) == 1
    assert "the same command goes on" in errors.decode()
    assert not (out / "config.json").exists()


def test_self_check_notices_wrong_weights(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = storage.encode_packed

    def turned(tensor: AffineTensor, *, sparse: bool = False) -> dict[str, Any]:
        rows = AffineTensor(tensor.codes[::-1].copy(), tensor.scale, tensor.zero_point, tensor.grid)
        return encode(rows, sparse=sparse)

    monkeypatch.setattr(storage, "encode_packed", turned)
    with pytest.raises(PenjingError, match="self-check failed: the saved model's logits are off"):
        compress(model, tmp_path / "out", "int4", group_size=32)
    assert not (tmp_path / "out" / "config.json").exists()


def test_unknown_families_are_compressed_and_the_verdict_says_what_was_not_checked(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", model_type="llamoid")
    result = compress(model, tmp_path / "out", "int4", group_size=32)
    assert "logits not compared" in result.check["verdict"]
    assert "llamoid" in result.check["verdict"]
    assert affine.PER_CHANNEL == -1


def test_program(model: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("version: 1\nrules:\n  - quantize: {bits: 8, group_size: -1}\n")
    program = [sys.executable, "-m", "penjing"]
    arguments = ["compress", str(model), "-o", str(tmp_path / "out"), "--recipe", str(recipe), "--json"]
    child = subprocess.run([*program, *arguments], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert child.stderr.startswith("memory: at most ")
    assert child.stderr.count("\n") == 1
    answer = json.loads(child.stdout)
    fields = "output size_bytes original_size_bytes bits_per_weight sparsity seconds peak_rss_bytes blocks"
    assert {*fields.split(), "resumed_at_block", "digest"} <= answer.keys()
    child = subprocess.run([*program, "inspect", str(tmp_path / "out"), "--json"], capture_output=True, text=True)
    summary = json.loads(child.stdout)
    assert summary["family"] == "llama"
    assert summary["layers"] == 3
    assert summary["parameters"] == sum(tensor.size for tensor in llama_tensors().values())
    assert summary["size_bytes"] == answer["size_bytes"]
    assert summary["bits_per_weight"] == pytest.approx(answer["bits_per_weight"])
    assert summary["format"] == "int8 channel"
    child = subprocess.run(
        [*program, "compress", str(model), "-o", str(tmp_path / "b"), "--bits", "99"], capture_output=True, text=True
    )
    assert (child.returncode, child.stderr.count("\n")) == (2, 1)
    assert "bits=99" in child.stderr


@pytest.mark.parametrize(("storage", "word"), [("dense", "stored as zeros"), ("bitmask", "only Penjing reads")])
def test_how_zeros_are_stored_is_said(storage: Any, word: str, model: Path, tmp_path: Path) -> None:
    said: list[str] = []
    compress(model, tmp_path / "out", "int4-sparse50", group_size=32, sparse_storage=storage, announce=said.append)
    assert [word in line for line in said] == [False, True]


def test_calibration_data_that_no_method_needs_is_not_used_and_that_is_said(model: Path, tmp_path: Path) -> None:
    said: list[str] = []
    compress(model, tmp_path / "out", "int8", calibration=["absent.txt"], announce=said.append)
    assert said[0].startswith("no method of this recipe needs calibration")


@pytest.mark.parametrize(
    ("family", "without", "first"),
    [
        ("llama", None, None),
        ("cohere", None, "model_type 'cohere' has no description: what is made of it is served by transformers' graph"),
        ("cohere", "vocab_size", "Penjing will not serve the result: .*vocab_size is missing"),
    ],
)
def test_that_the_engine_will_not_serve_the_result_is_said_before_the_work(
    family: str, without: str | None, first: str | None, tmp_path: Path
) -> None:
    make(tmp_path / "model", family)
    values = json.loads((tmp_path / "model" / "config.json").read_text())
    values.pop(without, None)
    (tmp_path / "model" / "config.json").write_text(json.dumps(values))
    said: list[str] = []
    compress(tmp_path / "model", tmp_path / "out", bits=4, group_size=16, announce=said.append)
    if first is None:
        assert not any("serve" in line for line in said)
    else:
        assert re.search(first, said[0])


def test_read_safetensors_sees_the_metadata_that_transformers_wants(model: Path, tmp_path: Path) -> None:
    compress(model, tmp_path / "out", "int8")
    assert read_safetensors(tmp_path / "out" / "model.safetensors")[1] == {"format": "pt"}


def test_clipped_weights_are_reported(model: Path, tmp_path: Path) -> None:
    """A percentile leaves out the largest weight of each group: one in 32, of which some are near enough to its end."""
    result = compress(model, tmp_path / "out", bits=4, group_size=32, observer="percentile")
    assert len(result.clipped) == 21
    assert all(0 < share < 2 / 32 for share in result.clipped.values())
    assert compress(model, tmp_path / "plain", bits=4, group_size=32).clipped == {}
    assert ("clipped" in str(result)) == any(share > 0.01 for share in result.clipped.values())
