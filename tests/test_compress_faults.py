"""What the streamed compressor refuses, and that nothing half-written looks whole."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from penjing.compress import compress
from penjing.errors import BadCheckpoint, BadInput, BadRecipe, OutOfBudget, PenjingError, Unsupported
from tiny_llama import NOVELIST, command, llama_tensors, make_model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model(tmp_path / "model")


def spoil_nan(folder: Path) -> None:
    tensors = llama_tensors()
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = np.nan
    make_model(folder, tensors)


def spoil_infinite_embedding(folder: Path) -> None:
    tensors = llama_tensors()
    tensors["model.embed_tokens.weight"][3, 5] = np.inf
    make_model(folder, tensors)


def spoil_dtype(folder: Path) -> None:
    tensors = llama_tensors()
    tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"].astype(np.int32)
    make_model(folder, tensors)


def spoil_truncated(folder: Path) -> None:
    file = folder / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def spoil_missing(folder: Path) -> None:
    (folder / "model-00001-of-00002.safetensors").unlink()


def spoil_family(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))


def spoil_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")


BAD_MODELS = {
    "tokenizer": (spoil_tokenizer, BadCheckpoint, r"tokenizer.json: EOF .*a tokenizers-format file is needed"),
    "NaN": (spoil_nan, BadCheckpoint, r"model.layers.1.mlp.up_proj.weight has a NaN"),
    "infinity in a copy": (spoil_infinite_embedding, BadCheckpoint, r"model.embed_tokens.weight has a NaN or an inf"),
    "wrong dtype": (spoil_dtype, BadCheckpoint, r"up_proj.weight has dtype int32"),
    "truncated": (spoil_truncated, BadCheckpoint, r"truncated: tensor"),
    "missing shard": (spoil_missing, BadCheckpoint, r"shard model-00001-of-00002.safetensors is missing"),
    "transposed family": (spoil_family, Unsupported, r"'gpt2' stores its weights transposed"),
}


@pytest.mark.parametrize("case", BAD_MODELS)
def test_bad_models_leave_nothing_that_looks_whole(case: str, model: Path, tmp_path: Path) -> None:
    spoil, error, message = BAD_MODELS[case]
    spoil(model)
    with pytest.raises(error, match=message) as caught:
        compress(model, tmp_path / "out", "int4", group_size=32)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "config.json").exists()


BAD_SETTINGS: dict[str, tuple[dict[str, Any], type[BadInput], str]] = {
    "group size": (
        {"bits": 4, "group_size": 48},
        BadRecipe,
        r"group_size=48 does not divide model.layers.0.mlp.gate_proj.weight, shape \(96, 64\); these do: 16, 32, 64,",
    ),
    "pattern": ({"pattern": "2:7"}, BadRecipe, "pattern=2:7 does not divide"),
    "bits": ({"bits": 1}, BadRecipe, "bits=1"),
    "sparsity": ({"sparsity": 1.5}, BadRecipe, "between 0 and 1"),
    "method": ({"method": "gptx"}, BadRecipe, "method 'gptx' is unknown"),
    "nothing": ({}, BadRecipe, "nothing to do"),
    "storage": ({"bits": 8, "sparse_storage": "bitmap"}, BadInput, "dense or bitmask"),
    "check": ({"bits": 8, "check": "some"}, BadInput, "check='some'"),
    "target": (
        {"recipe": {"version": 1, "rules": [{"targets": "*.q_projj", "quantize": {}}]}},
        BadRecipe,
        "target '.*q_projj' matches no module",
    ),
}


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_bad_settings_are_refused_before_anything_is_written(case: str, model: Path, tmp_path: Path) -> None:
    settings, error, message = BAD_SETTINGS[case]
    with pytest.raises(error, match=message):
        compress(model, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_folders_that_may_not_be_written_to(model: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="is the model itself"):
        compress(model, model, "int8")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years")
    for restart in (False, True):
        with pytest.raises(BadInput, match=r"something else \(thesis.txt\)"):
            compress(model, tmp_path / "full", "int8", restart=restart)
    assert [file.name for file in (tmp_path / "full").iterdir()] == ["thesis.txt"]
    (tmp_path / "file").write_text("")
    with pytest.raises(PenjingError, match="file"):
        compress(model, tmp_path / "file", "int8")


def test_full_disk_is_told_before_and_while_writing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        with pytest.raises(OutOfBudget, match=r"\d+ bytes are needed on the disk, 1000 are free"):
            compress(model, tmp_path / "before", "int4", group_size=32)
    code = "import resource, signal, sys; from penjing.cli import main;" + (
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN);resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000)); main()"
    )
    child = subprocess.run(
        [sys.executable, "-c", code, *command(model, tmp_path / "out")[3:]], capture_output=True, text=True
    )
    assert child.returncode == 1
    assert child.stderr.count("\n") == 3  # the memory that it takes, how zeros are stored, and the error
    assert "safetensors: File too large" in child.stderr
    assert not list((tmp_path / "out").glob("*.partial"))
    assert not (tmp_path / "out" / "config.json").exists()


def test_memory_limit_is_kept_or_refused(tmp_path: Path, model: Path) -> None:
    with pytest.raises(OutOfBudget, match=r"memory_limit=1000 bytes: .* need \d+ bytes at least"):
        compress(model, tmp_path / "out", "int4", group_size=32, memory_limit=1000)
    code = (
        "import sys, json, dataclasses, penjing;"
        "print(json.dumps(dataclasses.asdict(penjing.compress(sys.argv[1], sys.argv[2], 'int4-sparse50', group_size=64,"
        " memory_limit=300 << 20))))"
    )
    child = subprocess.run([sys.executable, "-c", code, str(NOVELIST), str(tmp_path / "n")], stdout=subprocess.PIPE)
    answer = json.loads(child.stdout)
    assert answer["peak_rss_bytes"] <= answer["memory_bound_bytes"] <= 300 << 20
    assert answer["peak_rss_bytes"] > 30 << 20


def test_a_misspelt_option_is_named_with_the_nearest(model: Path, tmp_path: Path) -> None:
    recipe = {"version": 1, "rules": [{"quantize": {"method": "hqq", "options": {"turn": 3}}}]}
    with pytest.raises(BadRecipe, match="method hqq has no option 'turn'; did you mean 'turns'"):
        compress(model, tmp_path / "out", recipe)


@pytest.mark.parametrize(
    ("output", "changes", "message"),
    [
        ("text.txt", {}, "is a file; give a folder"),
        ("out", {"evaluate": "none.txt"}, "none.txt: No such file or directory; give a file with text"),
        ("out", {"method": "gptq", "calibration": ["folder"]}, "--calibration .*folder: is a folder; give a file"),
    ],
    ids=["output", "evaluation", "calibration"],
)
def test_what_is_asked_is_looked_at_before_the_work(
    output: str, changes: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("It was a dark night")
    Path("folder").mkdir()
    with pytest.raises(BadInput, match=message) as caught:
        compress("model", output, bits=4, group_size=8, **changes)
    assert "\n" not in str(caught.value)
    assert not Path("out").exists()
