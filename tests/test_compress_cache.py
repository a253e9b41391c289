"""Steps of the cache of keys and values: those that transformers' own cache shows, and where readers look for them."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from calibrate_models import FAMILIES, make, stopping_after, text
from penjing import models
from penjing.calibrate import Calibration, needs, open_calibrator
from penjing.checkpoint import kv_cache, open_checkpoint, write_safetensors
from penjing.checkpoint.describe import describe
from penjing.compress import compress
from penjing.errors import BadRecipe, PenjingError, Unsupported
from penjing.export import export
from penjing.recipe import from_json
from stepping import all_logits, greedy
from test_compress_consumers import ids
from tiny_llama import NOVELIST

SAMPLES, LENGTH = 6, 24
ROWS: dict[str, Any] = {"samples": SAMPLES, "sequence_length": LENGTH}
RTN: dict[str, Any] = {"bits": 8, "group_size": -1, "method": "rtn"}
GPTQ: dict[str, Any] = {"bits": 4, "group_size": 16, "method": "gptq"}
LATENT = {"q_lora_rank": None, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
HYBRID = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "num_experts": 2,
    "num_experts_per_tok": 1,
}
OTHERS: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 8},
    "mistral": {"head_dim": 8, "sliding_window": 5},
    "deepseek_v3": {**LATENT, "first_k_dense_replace": 3, "num_key_value_heads": 4},
    "qwen3_next": {
        **DELTA,
        **HYBRID,
        "head_dim": 8,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
    "gemma3n_text": {"head_dim": 8, "num_kv_shared_layers": 1, "layer_types": ["full_attention"] * 3},
}


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, settings in OTHERS.items():
        monkeypatch.setitem(FAMILIES, name, settings)
    (tmp_path / "text.txt").write_text(text())
    return tmp_path


def run(work: Path, out: str = "out", **changes: Any) -> Any:
    settings = {"kv_cache": "fp8", **RTN, **ROWS, "calibration": [work / "text.txt"], **changes}
    return compress(work / "model", work / out, **settings)


def tokens() -> torch.Tensor:
    words = text().split()[: SAMPLES * LENGTH]
    return torch.tensor([int(word[1:]) for word in words]).reshape(SAMPLES, LENGTH)


def decoded(model: Any, folder: Path) -> Any:
    """transformers' model with the weights that a folder's codes stand for."""
    saved, plain = open_checkpoint(folder), folder.with_name(f"{folder.name}-decoded")
    model.config.save_pretrained(plain)
    names = [name for name in saved.names if not name.endswith(("k_scale", "v_scale"))]
    tensors = {name: np.ascontiguousarray(saved.tensor(name), np.float32) for name in names}
    write_safetensors(plain / "model.safetensors", tensors, {"format": "pt"})
    return transformers.AutoModelForCausalLM.from_pretrained(plain).float().eval()


def kept(model: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of each layer, as transformers' cache without windows holds them once the rows went through."""
    cache = transformers.DynamicCache()
    word = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    with torch.no_grad():
        model(input_ids=tokens(), use_cache=True, **{word: cache})
    return [(layer.keys, layer.values) for layer in cache.layers]


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma3_text", "phi3", "qwen3_moe"])
def test_steps_are_those_of_what_transformers_caches(family: str, method: str, work: Path) -> None:
    """Of the compressed model: its own weights, through transformers, whole and with another cache."""
    model = make(work / "model", family)
    settings = {"rtn": RTN, "gptq": GPTQ, "awq": {**RTN, "bits": 4, "group_size": 16, "transform": "awq"}}[method]
    result = run(work, **settings)
    saved = open_checkpoint(work / "out")
    right = kept(decoded(model, work / "out"))
    assert len(right) == len(result.kv_cache["layers"]) == 3
    for number, both in enumerate(right):
        name = f"model.layers.{number}.self_attn"
        for part, word, numbers in zip(("k_scale", "v_scale"), ("keys", "values"), both, strict=True):
            step = saved.read(f"{name}.{part}")
            assert (step.shape, step.dtype) == ((1,), np.float32)
            assert float(step[0]) == pytest.approx(float(numbers.abs().max()) / 448, rel=1e-4)
            codes = (numbers / torch.from_numpy(step)).clamp(-448, 448).to(torch.float8_e4m3fn).float()
            lost = (codes * torch.from_numpy(step) - numbers).square().sum() / numbers.square().sum()
            # told of 256 tokens, or of all where there are not that many
            assert result.kv_cache["layers"][name][f"{word}_loss"] == pytest.approx(float(lost), rel=1e-3)


def test_weights_are_what_they_are_without_it(work: Path) -> None:
    make(work / "model", "llama")
    for settings in (RTN, GPTQ):
        for out, kind in (("with", "fp8"), ("without", None)):
            text_for = {"calibration": () if settings is RTN and kind is None else [work / "text.txt"]}
            run(work, f"{out}-{settings['method']}", kv_cache=kind, **settings, **text_for)
        one, two = (open_checkpoint(work / f"{out}-{settings['method']}") for out in ("with", "without"))
        assert len(one.infos.keys() - two.infos.keys()) == 6
        for name in two.infos:
            np.testing.assert_array_equal(one.read(name), two.read(name))


@pytest.mark.parametrize("settings", [RTN, GPTQ, {**GPTQ, "recover": True}], ids=["rtn", "gptq", "recovered"])
@pytest.mark.parametrize("reports", [2, 4, 7])
def test_an_interrupted_run_ends_with_the_same_bytes(reports: int, settings: dict[str, Any], work: Path) -> None:
    make(work / "model", "llama")
    whole = run(work, "whole", shard_bytes=1, **settings)

    with pytest.raises(PenjingError, match="the same command goes on from there"):
        run(work, shard_bytes=1, progress=stopping_after(reports), **settings)
    with pytest.raises(PenjingError, match=r"an unfinished run with another .*recipe"):
        run(work, shard_bytes=1, kv_cache=None, **{**settings, "method": "gptq"})
    again = run(work, shard_bytes=1, **settings)
    assert (again.digest, again.kv_cache) == (whole.digest, whole.kv_cache)
    for file in (work / "whole").iterdir():
        assert file.read_bytes() == (work / "out" / file.name).read_bytes()


@pytest.mark.timeout(600)
def test_kill_9_ends_with_the_same_bytes(tmp_path: Path) -> None:
    flags = ["--kv-cache", "fp8", "--calibration", str(NOVELIST / "evaluation.txt"), "--samples", "8", "--shard-size"]
    flags += ["1KiB", "--sequence-length", "64", "--bits", "8", "--group-size", "-1", "--method", "rtn", "--json"]

    def program(out: str) -> list[str]:
        return [sys.executable, "-m", "penjing", "compress", str(NOVELIST), "-o", str(tmp_path / out), *flags]

    whole = json.loads(subprocess.run(program("whole"), capture_output=True, check=True).stdout)
    journal = tmp_path / "out" / ".journal"
    child = subprocess.Popen(program("out"), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while child.poll() is None and len(list(journal.glob("model-*.json"))) < 4:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert child.returncode == -signal.SIGKILL
    rest = json.loads(subprocess.run(program("out"), capture_output=True, check=True).stdout)
    assert rest["resumed_at_block"] >= 1
    assert (rest["digest"], rest["kv_cache"]) == (whole["digest"], whole["kv_cache"])
    shutil.rmtree(tmp_path)


def with_the_old_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention as in transformers 5.19, whose cache has the name that compressed-tensors 0.20 looks for."""
    kind = transformers.models.llama.modeling_llama.LlamaAttention
    forward = kind.forward
    if "cache" not in inspect.signature(forward).parameters:
        return

    def renamed(
        self: Any,
        hidden_states: Any,
        position_embeddings: Any = None,
        attention_mask: Any = None,
        past_key_values: Any = None,
        **others: Any,
    ) -> Any:
        cache = others.pop("cache", None) if past_key_values is None else past_key_values
        return forward(self, hidden_states, position_embeddings, attention_mask, **{**others, "cache": cache})

    monkeypatch.setattr(kind, "forward", renamed)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "settings", [{}, RTN, GPTQ, {**RTN, "activations": "int8"}, {"recipe": "fp8_dynamic"}], ids=str
)
def test_compressed_tensors_finds_the_steps(
    settings: dict[str, Any], work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("compressed_tensors")
    with_the_old_name(monkeypatch)
    make(work / "model", "llama")
    compress(work / "model", work / "out", kv_cache="fp8", calibration=[work / "text.txt"], **ROWS, **settings)
    loaded, said = transformers.AutoModelForCausalLM.from_pretrained(
        work / "out", dtype=torch.float32, output_loading_info=True
    )
    assert not any(said.values()), said
    saved = open_checkpoint(work / "out")
    for number, layer in enumerate(loaded.model.layers):
        for part in ("k_scale", "v_scale"):
            stored = saved.read(f"model.layers.{number}.self_attn.{part}")
            np.testing.assert_array_equal(getattr(layer.self_attn, part).detach().numpy(), stored)
    with torch.no_grad():
        loaded(input_ids=tokens())


@pytest.mark.filterwarnings("ignore")
def test_transformers_reads_the_weights_whatever_it_makes_of_the_steps(work: Path) -> None:
    """As it is installed, with compressed-tensors as it is: at worst it names the steps as unexpected."""
    pytest.importorskip("compressed_tensors")
    model = make(work / "model", "llama")
    run(work)
    loaded, said = transformers.AutoModelForCausalLM.from_pretrained(
        work / "out", dtype=torch.float32, output_loading_info=True
    )
    assert all(name.endswith(("k_scale", "v_scale")) for name in said.pop("unexpected_keys"))
    assert not any(said.values()), said
    with torch.no_grad():
        found, right = (each(input_ids=tokens()).logits for each in (loaded, decoded(model, work / "out")))
    assert float((found - right).norm() / right.norm()) < 0.05  # of keys and values that are rounded


VLLM = """
import json, os, sys
os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR",
               "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
def steps(model):
    attentions = {name: each for name, each in model.named_modules() if hasattr(each, "_k_scale_float")}
    return {name: [each.kv_cache_dtype, each._k_scale_float, each._v_scale_float] for name, each in attentions.items()}
def main():
    from vllm import LLM, SamplingParams
    llm = LLM(sys.argv[1], enforce_eager=True, max_model_len=256)
    prompt = {"prompt_token_ids": json.loads(sys.argv[2])}
    settings = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    written = list(llm.generate([prompt], settings)[0].outputs[0].token_ids)
    print("FOUND", json.dumps([llm.apply_model(steps)[0], written]))
if __name__ == "__main__":
    main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"recipe": "w8a8"}], ids=["alone", "w8a8"])
def test_vllm_keeps_its_cache_in_these_steps(settings: dict[str, Any], tmp_path: Path) -> None:
    """It takes FP8 for the cache by itself, since config.json says so, and writes what it writes without."""
    python = os.environ.get("PENJING_VLLM_PYTHON")
    if not python:
        pytest.skip("PENJING_VLLM_PYTHON does not name a Python that has vllm")
    compress(NOVELIST, tmp_path / "out", kv_cache="fp8", calibration=[NOVELIST / "evaluation.txt"], **ROWS, **settings)
    (tmp_path / "run.py").write_text(VLLM)
    command = [python, str(tmp_path / "run.py"), str(tmp_path / "out"), json.dumps(ids())]
    child = subprocess.run(command, capture_output=True, text=True)
    answers = [line for line in child.stdout.splitlines() if line.startswith("FOUND ")]
    assert answers, child.stderr[-2000:]
    found, written = json.loads(answers[0].removeprefix("FOUND "))
    saved = open_checkpoint(tmp_path / "out")
    assert len(found) == 6
    for name, (dtype, *both) in found.items():
        stored = [float(saved.read(f"{name.removesuffix('.attn')}.{part}")[0]) for part in ("k_scale", "v_scale")]
        assert (dtype, both) == ("fp8", stored)
    assert written == greedy(models.load(tmp_path / "out"), ids(), 8)


def test_the_engine_computes_as_without_the_steps(work: Path) -> None:
    make(work / "model", "llama")
    run(work)
    run(work, "plain", kv_cache=None, calibration=())
    words = tokens()[0].tolist()
    one, two = (all_logits(models.load(work / name), words) for name in ("out", "plain"))
    np.testing.assert_array_equal(one, two)
    said = describe(work / "out")
    assert (said.kv_cache, describe(work / "plain").kv_cache) == ("fp8", None)
    assert "kv cache        fp8" in str(said)


def test_the_cache_alone_leaves_weights_as_they_are(work: Path) -> None:
    make(work / "model", "llama", torch.bfloat16)
    result = run(work, **dict.fromkeys(RTN))
    assert (result.check["modules"], result.bits_per_weight > 16) == (0, True)
    saved, source = open_checkpoint(work / "out"), open_checkpoint(work / "model")
    for name in source.infos:
        np.testing.assert_array_equal(saved.read(name), source.read(name))
    added = saved.infos.keys() - source.infos.keys()
    assert {str(saved.infos[name].dtype) for name in added} == {"bfloat16"}
    assert from_json({"version": 1, "kv_cache": "fp8"}).to_json()["kv_cache"] == "fp8"
    assert json.loads((work / "out" / "penjing.json").read_text())["recipe"]["rules"] == []


@pytest.mark.parametrize("settings", [RTN, dict.fromkeys(RTN)], ids=["compressed", "cache alone"])
def test_compressed_again_old_steps_go_and_new_ones_are_found(settings: dict[str, Any], work: Path) -> None:
    make(work / "model", "llama")
    run(work, **settings)
    said: list[str] = []
    compress(work / "out", work / "less", bits=4, group_size=16, announce=said.append)
    assert sum("its 6 steps for the cache of keys and values are left out" in line for line in said) == 1
    less = open_checkpoint(work / "less")
    assert less.config["quantization_config"]["kv_cache_scheme"] is None
    assert not any(name.endswith(("k_scale", "v_scale")) for name in less.infos)
    found = compress(work / "out", work / "again", **{**GPTQ, **ROWS}, kv_cache="fp8", calibration=[work / "text.txt"])
    again = open_checkpoint(work / "again")
    assert found.kv_cache is not None
    for name, its in found.kv_cache["layers"].items():
        assert float(again.read(f"{name}.k_scale")[0]) == pytest.approx(its["largest_keys"] / 448)


def test_other_formats_keep_the_steps_or_need_none(work: Path) -> None:
    make(work / "model", "llama")
    run(work, **dict.fromkeys(RTN), sparsity=0.5, prune_method="l1", sparse_storage="bitmask")
    export(work / "out", work / "dense", format="compressed-tensors")
    dense = open_checkpoint(work / "dense")
    assert dense.config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert dense.config["quantization_config"]["kv_cache_scheme"]["num_bits"] == 8
    assert sum(name.endswith(("k_scale", "v_scale")) for name in dense.infos) == 6
    compress(NOVELIST, work / "novelist", **RTN, kv_cache="fp8", calibration=[NOVELIST / "evaluation.txt"], **ROWS)
    export(work / "novelist", work / "out.gguf", format="gguf")
    assert describe(work / "out.gguf").kv_cache is None


def test_layers_without_keys_and_values_are_left_and_said(work: Path) -> None:
    model = make(work / "model", "qwen3_next")
    result = run(work)
    assert list(result.kv_cache["layers"]) == ["model.layers.1.self_attn"]
    assert result.kv_cache["left_as_is"] == ["model.layers.0", "model.layers.2"]
    assert "steps of fp8 for 1 layers" in str(result)
    assert "2 layers keep none, and are left as they are" in str(result)
    with torch.no_grad():
        cache = transformers.DynamicCache(config=model.config)
        word = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
        decoded(model, work / "out")(input_ids=tokens(), use_cache=True, **{word: cache})
    step = float(open_checkpoint(work / "out").read("model.layers.1.self_attn.k_scale")[0])
    assert step == pytest.approx(float(cache.layers[1].keys.abs().max()) / 448, rel=1e-3)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "latents": ("deepseek_v3", {}, "model.layers.0.self_attn keeps latents, not keys and values"),
    "shared": ("gemma3n_text", {}, "reads the keys and values of another layer; leave kv_cache out"),
    "other names": ("gpt_neox", {}, "no layer has k_proj and v_proj, or qkv_proj"),
    "no cache": ("bert", {}, "no layer has k_proj and v_proj, or qkv_proj"),
    "int8": ("llama", {"kv_cache": "int8"}, "kv_cache='int8': servers read steps of fp8 alone; give fp8"),
    "true": ("llama", {"kv_cache": True}, "kv_cache=True: servers read steps of fp8 alone; give fp8"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_one_line_and_leaves_nothing(case: str, work: Path) -> None:
    family, changes, message = REFUSED[case]
    make(work / "model", family)
    with pytest.raises((BadRecipe, Unsupported), match=message) as caught:
        run(work, **changes)
    assert "\n" not in str(caught.value)
    assert not (work / "out").exists()


def test_numbers_that_are_none_stop_the_run(work: Path) -> None:
    make(work / "model", "qwen3")
    saved = open_checkpoint(work / "model")
    tensors = {name: saved.read(name) for name in saved.names}
    saved.close()
    tensors["model.layers.1.self_attn.k_norm.weight"][3] = 3e38
    write_safetensors(work / "model" / "model.safetensors", tensors, {"format": "pt"})
    with pytest.raises(PenjingError, match=r"model.layers.1.self_attn: keys have a NaN or an infinity: the model over"):
        run(work, **dict.fromkeys(RTN))
    assert not (work / "out" / "config.json").exists()


def test_without_text_the_model_writes_its_own(tmp_path: Path) -> None:
    said: list[str] = []
    found = compress(NOVELIST, tmp_path / "out", kv_cache="fp8", samples=2, sequence_length=16, announce=said.append)
    assert any(line.startswith("NO CALIBRATION TEXT: the model writes 2 × 16 tokens itself") for line in said)
    assert found.kv_cache is not None
    assert len(found.kv_cache["layers"]) == 6


@pytest.mark.parametrize("damage", [-1.0, 0.0, np.nan, None, "none"])
def test_steps_that_are_none_are_found_by_the_self_check(damage: Any, work: Path) -> None:
    make(work / "model", "llama")
    noted = run(work).kv_cache["layers"]
    name, saved = "model.layers.2.self_attn.v_scale", open_checkpoint(work / "out")
    kv_cache.check(saved, noted)
    tensors = {each: saved._stored(each, None) for each in saved.infos}
    saved.close()
    if damage is None:
        del tensors[name]
    elif damage != "none":
        tensors[name] = np.array([damage], np.float32)
    write_safetensors(work / "out" / "model.safetensors", tensors, {"format": "pt"})
    message = "no layer put keys and values" if damage == "none" else f"{name} is no positive step; please report this"
    with pytest.raises(PenjingError, match=message):
        kv_cache.check(open_checkpoint(work / "out"), {} if damage == "none" else noted)


def test_the_bound_of_the_memory_counts_what_is_kept(work: Path) -> None:
    make(work / "model", "llama")
    rows = Calibration((work / "text.txt",), SAMPLES, LENGTH, 0)
    calibrator = open_calibrator(open_checkpoint(work / "model"), rows, {}, work, "cpu")
    before = needs(calibrator, {}).activations
    calibrator.watch_cache()
    width = 2 * 2 * 8  # keys and values of two heads
    assert needs(calibrator, {}).activations - before >= 2 * 256 * width * 4  # of 256 tokens, and as they are rounded


def test_the_whole_is_not_trained_after_its_steps_are_found(work: Path) -> None:
    make(work / "model", "llama")
    rule = {"quantize": {"method": "gptq", "bits": 3, "group_size": 16}}
    recipe = {"version": 1, "kv_cache": "fp8", "rules": [rule], "recover": {"epochs": 1, "codes": True, "distill": 1}}
    said: list[str] = []
    settings = {**dict.fromkeys(RTN), "kv_cache": None, "recipe": recipe, "announce": said.append}
    found = run(work, **settings)
    assert any("distill is left out, because it would move what steps of the cache were found for" in it for it in said)
    assert (found.distilled, len(found.recovered), len(found.kv_cache["layers"])) == (None, 3, 3)
