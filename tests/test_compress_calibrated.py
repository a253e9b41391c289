"""Compressing with calibration: the chain against a plain computation in memory, kills, memory, and what is refused."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch

from calibrate_models import make, stopping_after, text, workplace
from penjing.calibrate import stream
from penjing.checkpoint import open_checkpoint, write_safetensors
from penjing.compress import compress
from penjing.errors import BadInput, OutOfBudget, PenjingError
from penjing.formats.affine import AffineTensor
from penjing.methods import apply
from penjing.methods.statistics import Collector, Statistics
from penjing.presets import build
from tiny_llama import NOVELIST

GPTQ: dict[str, Any] = {"method": "gptq", "bits": 3, "group_size": 16}
ROWS: dict[str, Any] = {"samples": 10, "sequence_length": 24}


@pytest.fixture
def work(tmp_path: Path) -> Path:
    return workplace(tmp_path)


def run(work: Path, out: str, **changes: Any) -> Any:
    settings = {**GPTQ, **ROWS, "calibration": [work / "text.txt"], "shard_bytes": 1, **changes}
    return compress(work / "model", work / out, **settings)


IN_TURN = [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.o_proj"]]
IN_TURN += [["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]]


@pytest.mark.parametrize("held", [True, False])
def test_the_chain_is_that_of_a_whole_model_in_memory(held: bool, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layer inputs of the whole model with all blocks before already replaced, then GPTQ on them; where all of the text
    may be held in a block, with all layers of the block that come before replaced too."""
    import transformers

    if not held:
        monkeypatch.setattr(stream, "MOST_HELD", 0)
    run(work, "out")
    saved = open_checkpoint(work / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(work / "model").float().eval()
    words = text().split()
    tokens = torch.tensor([int(word[1:]) for word in words[: 10 * 24]]).reshape(10, 24)
    rule = build(None, **GPTQ).rules[0]
    for number, layer in enumerate(model.model.layers):
        for names in IN_TURN if held else [[name for some in IN_TURN for name in some]]:
            linears = {name: layer.get_submodule(name) for name in names}
            collectors = {name: Collector(m.in_features, ("hessian",)) for name, m in linears.items()}
            hooks = [
                m.register_forward_pre_hook(lambda _, args, c=collectors[n]: c.add(args[0].flatten(0, -2).numpy()))
                for n, m in linears.items()
            ]
            with torch.no_grad():
                model(input_ids=tokens)
            for hook in hooks:
                hook.remove()
            for name, linear in linears.items():
                weight = linear.weight.detach().numpy()
                expected = apply.solve(rule, weight, collectors[name].statistics(), scale_dtype="float32", seed=0)
                found = saved.weight(f"model.layers.{number}.{name}")
                assert isinstance(found, AffineTensor)
                assert isinstance(expected, AffineTensor)
                assert (found.codes == expected.codes).mean() > 0.995  # sums in another order turn a code at times
                # the next layers see what was saved, so that one turned code does not spread into this comparison
                linear.weight.data = torch.from_numpy(found.decode())


def test_what_is_reported_of_calibration(work: Path) -> None:
    run(work, "out")
    said = json.loads((work / "out" / "penjing.json").read_text())["calibration"]
    assert (said["samples"], said["sequence_length"]) == (10, 24)
    assert len(said["layers"]) == 21
    assert all(layer["loss"] <= layer["plain_loss"] for layer in said["layers"].values())
    assert said["starved"] == said["uncalibrated"] == said["kept_plain"] == []
    assert not (work / "out" / ".journal").exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "imatrix"},
        {"method": "autoround"},
        {"method": "rtn", "prune_method": "wanda", "sparsity": 0.5},
        {"prune_method": "sparsegpt", "sparsity": 0.5},
        {"method": "joint", "prune_method": "joint", "sparsity": 0.5},
    ],
    ids=str,
)
def test_every_method_that_needs_data_gets_it(settings: dict[str, Any], work: Path) -> None:
    result = run(work, "out", **settings)
    assert result.check["modules"] == 21
    if "sparsity" in settings:
        assert result.sparsity == pytest.approx(0.5, abs=0.02)  # few bits round some more to 0


def test_a_rule_without_data_stands_beside_one_with_it(work: Path) -> None:
    rules = [{"targets": "*.down_proj", "prune": {"sparsity": 0.25}}, {"targets": "*", "quantize": {**GPTQ}}]
    settings = dict.fromkeys(GPTQ)
    run(work, "out", recipe={"version": 1, "rules": rules}, **settings)
    saved, source = open_checkpoint(work / "out"), open_checkpoint(work / "model")
    plainly, name = build(prune_method="l1", sparsity=0.25).rules[0], "model.layers.1.mlp.down_proj"
    expected = apply.solve(plainly, source.weight(name), Statistics(), scale_dtype="float32", seed=0)
    np.testing.assert_array_equal(saved.weight(name), expected)
    assert isinstance(saved.weight("model.layers.1.mlp.up_proj"), AffineTensor)


@pytest.mark.parametrize("method", ["awq", "smoothquant"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox", "qwen3_moe"])
def test_scales_are_folded_without_changing_the_model(method: str, family: str, tmp_path: Path) -> None:
    """With 8 bits a row the model is as near to the original as without the transform; transformers computes it."""
    model = make(tmp_path / "model", family)
    (tmp_path / "text.txt").write_text(text())
    rule = {"transform": {"method": method}, "quantize": {"bits": 8, "group_size": -1}}
    settings = {"calibration": [tmp_path / "text.txt"], "samples": 10, "sequence_length": 24}
    compress(tmp_path / "model", tmp_path / "out", {"version": 1, "rules": [rule]}, **settings)
    said = json.loads((tmp_path / "out" / "penjing.json").read_text())["calibration"]
    saved, source = open_checkpoint(tmp_path / "out"), open_checkpoint(tmp_path / "model")
    norms = [name for name in source.infos if "norm" in name and name in saved.infos]
    assert sum((saved.read(name) != source.read(name)).any() for name in norms) >= 3
    # what the experts share with one another and the router is left; so are attention's outputs where heads are grouped
    assert not any(name in module for module in said["unfolded"] for name in ("q_proj", "down_proj", "query_key_value"))
    compress(tmp_path / "model", tmp_path / "rounded", bits=8, group_size=-1)
    folded, rounded = (off_by(model, tmp_path / name) for name in ("out", "rounded"))
    assert folded < 1.5 * rounded


def off_by(model: Any, folder: Path) -> float:
    """How far the logits of a compressed model's numbers, computed by transformers, are from the original's."""
    import transformers

    saved, plain = open_checkpoint(folder), folder.with_name(f"{folder.name}-decoded")
    model.config.save_pretrained(plain)
    tensors = {name: np.ascontiguousarray(saved.tensor(name), np.float32) for name in saved.names}
    write_safetensors(plain / "model.safetensors", tensors, {"format": "pt"})
    other = transformers.AutoModelForCausalLM.from_pretrained(plain).float().eval()
    with torch.no_grad():
        ids = torch.arange(3, 40)[None]
        right, found = model(input_ids=ids).logits, other(input_ids=ids).logits
    return float((found - right).norm() / right.norm())


@pytest.mark.parametrize("family", ["qwen3_moe", "gemma3_text", "gpt_neox", "bert", "cohere"])
def test_other_families_are_compressed(family: str, tmp_path: Path) -> None:
    make(tmp_path / "model", family)
    (tmp_path / "text.txt").write_text(text())
    result = run(tmp_path, "out")
    said = json.loads((tmp_path / "out" / "penjing.json").read_text())["calibration"]
    assert result.check["modules"] == len(said["layers"]) > 10


def stop_after(reports: int, work: Path, out: str, **changes: Any) -> None:
    with pytest.raises(PenjingError, match="the same command goes on from there"):
        run(work, out, progress=stopping_after(reports), **changes)


@pytest.mark.parametrize("reports", [1, 3, 5, 8])
def test_an_interrupted_run_ends_with_the_same_bytes(reports: int, work: Path) -> None:
    whole = run(work, "whole")
    stop_after(reports, work, "out")
    assert run(work, "out").digest == whole.digest
    for file in (work / "whole").iterdir():
        assert file.read_bytes() == (work / "out" / file.name).read_bytes()


def test_what_sees_is_compressed_without_data_and_refused_with_text(tmp_path: Path) -> None:
    import transformers

    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.ViTConfig(**shape, image_size=16, patch_size=4)
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(text())
    settings = {"method": "gptq", "group_size": 32, "calibration": [tmp_path / "text.txt"]}
    with pytest.raises(BadInput, match=r"ViTForImageClassification reads no text, .*; take methods without data"):
        compress(tmp_path / "model", tmp_path / "out", **settings)
    result = compress(tmp_path / "model", tmp_path / "out", bits=8, group_size=-1)
    assert (result.check["modules"], result.stacked_bytes) == (13, 0)
    small = open_checkpoint(tmp_path / "out")
    for name, parameter in safetensors.numpy.load_file(tmp_path / "model" / "model.safetensors").items():
        stored = small.tensor(name).astype(np.float32)
        step = np.abs(stored).max(axis=-1, keepdims=True) / 127 if stored.ndim == 2 else 0.0
        assert (np.abs(stored - parameter) <= 0.51 * step).all(), name


def test_another_text_in_the_same_folder_is_refused(work: Path) -> None:
    stop_after(4, work, "out")
    for changes in ({"samples": 9}, {"sequence_length": 20}):
        with pytest.raises(BadInput, match="another calibration"):
            run(work, "out", **changes)
    (work / "text.txt").write_text(text(seed=1))
    with pytest.raises(BadInput, match="another calibration"):
        run(work, "out")


FAULTS: dict[str, tuple[bytes | None, dict[str, Any], str]] = {
    "absent": (None, {}, "there is no such file"),
    "empty": (b" \n", {}, "the file is empty"),
    "encoding": (b"w3 \xff w4", {}, "byte 3 is not UTF-8"),
    "short": (b"w3 w4 w5", {}, "3 tokens of text; 10 samples of 24 tokens take 240"),
    "too long": (b"w3", {"sequence_length": 65}, "2 to 64, the most that this model can take"),
    "samples": (b"w3", {"samples": 0}, "samples=0"),
    "device": (b"w3", {"device": "tpu"}, "give auto, cpu or cuda"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_calibrated_on_is_one_line(fault: str, work: Path) -> None:
    raw, changes, message = FAULTS[fault]
    (work / "text.txt").unlink()
    if raw is not None:
        (work / "text.txt").write_bytes(raw)
    with pytest.raises(BadInput, match=message) as caught:
        run(work, "out", **changes)
    assert "\n" not in str(caught.value)
    assert not (work / "out").exists()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("layers.2.mlp.up_proj.weight", np.nan, r"model.layers.2.mlp.up_proj.weight has a NaN or an inf"),
        ("layers.1.input_layernorm.weight", 3e38, r"model.layers.1: .* has a NaN or an infinity: the model overflows"),
    ],
    ids=["NaN in a weight", "overflow in between"],
)
def test_numbers_that_are_none_stop_the_run_and_leave_no_model(
    name: str, value: float, message: str, work: Path
) -> None:
    saved = open_checkpoint(work / "model")
    tensors = {each: saved.read(each) for each in saved.names}
    saved.close()
    tensors[f"model.{name}"].flat[5] = value
    write_safetensors(work / "model" / "model.safetensors", tensors, {"format": "pt"})
    with pytest.raises(PenjingError, match=message) as caught:
        run(work, "out")
    assert "\n" not in str(caught.value)
    assert not (work / "out" / "config.json").exists()


def test_a_hessian_of_one_word_is_damped_and_said(work: Path) -> None:
    (work / "text.txt").write_text("w5 " * 400)
    run(work, "out", options={"damping": 0.0})
    layers = json.loads((work / "out" / "penjing.json").read_text())["calibration"]["layers"]
    assert max(layer.get("damping", 0) for layer in layers.values()) > 0


def test_a_disk_that_fills_up_is_gone_on_from(tmp_path: Path) -> None:
    whole = json.loads(subprocess.run(program(tmp_path / "whole"), capture_output=True, check=True).stdout)
    code = (
        "import resource, signal; from penjing.cli import main; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)); main()"
    )
    full = subprocess.run([sys.executable, "-c", code, *program(tmp_path / "out")[3:]], capture_output=True, text=True)
    assert full.returncode == 1
    assert "File too large" in full.stderr.splitlines()[-1]
    assert not (tmp_path / "out" / "config.json").exists()
    rest = json.loads(subprocess.run(program(tmp_path / "out"), capture_output=True, check=True).stdout)
    assert rest["digest"] == whole["digest"]


def test_a_limit_that_cannot_be_kept_is_refused_with_the_numbers(work: Path) -> None:
    with pytest.raises(OutOfBudget, match=r"need \d+ bytes at least; .*statistics"):
        run(work, "out", memory_limit=1000)


def test_a_limit_makes_batches_smaller(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # what this process had before must not decide; 65 MiB are saved by smaller parts and fewer statistics alone
    monkeypatch.setattr("penjing.hardware.peak_memory_bytes", lambda: 1 << 30)
    make(work / "model", "llama", hidden_size=256, intermediate_size=1024)
    rows = {"samples": 40, "sequence_length": 64, "calibration": [work / "long.txt"], "bits": 4}
    (work / "long.txt").write_text(text(40 * 64))

    def ran(out: str, limit: int | None) -> Any:
        result = run(work, out, **rows, memory_limit=limit)
        return result, json.loads((work / out / "penjing.json").read_text())["identity"]

    free, its = ran("free", None)
    assert (its["in_turn"], its["batch"]) == (True, 2048 // 64)
    _, its = ran("twice", free.memory_bound_bytes - (67 << 20))  # the text goes through each block twice instead
    assert (its["in_turn"], its["batch"]) == (False, 2048 // 64)
    _, its = ran("less", free.memory_bound_bytes - (100 << 20))
    assert not its["in_turn"]
    assert its["batch"] < 2048 // 64


def program(out: Path, *more: str, method: str = "gptq") -> list[str]:
    flags = ["--method", method, "--bits", "4", "--group-size", "64", "--shard-size", "1", "--check", "none", "--json"]
    rows = ["--calibration", str(NOVELIST / "evaluation.txt"), "--samples", "8", "--sequence-length", "64"]
    return [sys.executable, "-m", "penjing", "compress", str(NOVELIST), "-o", str(out), *flags, *rows, *more]


def killed(out: Path, method: str, seconds: float) -> bool:
    child = subprocess.Popen(program(out, method=method), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        child.communicate(timeout=seconds)
        return False
    except subprocess.TimeoutExpired:
        child.send_signal(signal.SIGKILL)
        child.communicate()
        return True


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("method", "kills"), [("gptq", 1), *(pytest.param(each, 20, marks=pytest.mark.slow) for each in ("gptq", "rtn"))]
)
def test_kill_9_at_any_moment_ends_with_the_same_bytes(method: str, kills: int, tmp_path: Path) -> None:
    """Runs that are killed once each, at any moment of theirs: each ends with the bytes of one that was not."""
    start = time.monotonic()
    command = program(tmp_path / "whole", method=method)
    whole = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    took = time.monotonic() - start
    random, happened = np.random.default_rng(), 0
    for number in range(3 * kills):
        out = tmp_path / f"out{number}"
        moment = took * random.random()
        if killed(out, method, moment):
            happened += 1
        else:
            took = moment  # it is over by then, on a machine that is less busy now
        rest = subprocess.run(program(out, method=method), capture_output=True, check=True)
        assert json.loads(rest.stdout)["digest"] == whole["digest"]
        shutil.rmtree(out)
        if happened == kills:
            break
    assert happened == kills


def test_memory_stays_below_the_bound(tmp_path: Path) -> None:
    answer = json.loads(subprocess.run(program(tmp_path / "out"), capture_output=True, check=True).stdout)
    assert answer["peak_rss_bytes"] <= answer["memory_bound_bytes"]
