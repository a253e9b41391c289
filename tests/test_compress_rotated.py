"""Rotated models: floats compute what they did, in transformers and in the engine, and few bits cost them less."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from calibrate_models import FAMILIES, make, text
from penjing import models
from penjing.checkpoint import open_checkpoint, write_safetensors
from penjing.compress import compress
from penjing.errors import BadRecipe, PenjingError, Unsupported
from penjing.presets import build
from penjing.recipe import from_json
from penjing.rotate import Rotated
from stepping import all_logits
from tiny_llama import NOVELIST

IDS = torch.arange(3, 40)[None]
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 12}
OTHERS: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gemma": {"head_dim": 8},
    "granite": {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    "deepseek_v3": LATENT
    | {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1}
    | {"topk_group": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4},
    "starcoder2": {},
    "olmo2": {},
}


@pytest.fixture(autouse=True)
def others(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, settings in OTHERS.items():
        monkeypatch.setitem(FAMILIES, name, settings)


def transformers_logits(folder: Path) -> np.ndarray:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).float().eval()
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits[0].numpy()


def run(work: Path, out: str = "out", **settings: Any) -> Any:
    return compress(work / "model", work / out, **{"rotate": True, "shard_bytes": 1, **settings})


def of_text(work: Path) -> dict[str, Any]:
    (work / "text.txt").write_text(text())
    return {"calibration": [work / "text.txt"], "samples": 10, "sequence_length": 24}


@pytest.mark.parametrize(
    "family",
    [
        *("llama", "llama-tied", "qwen2", "qwen3", "gemma", "granite"),
        *("mixtral", "qwen3_moe", "phi3", "deepseek_v3"),
    ],
)
def test_floats_compute_what_they_did(family: str, tmp_path: Path) -> None:
    """Grouped heads, tied embeddings, biases, experts, fused weights, norms of heads or around zero, latents."""
    model = make(tmp_path / "model", family)
    with torch.no_grad():
        right = model(input_ids=IDS, use_cache=False).logits[0].numpy()
    run(tmp_path)
    found = transformers_logits(tmp_path / "out")
    np.testing.assert_allclose(found, right, atol=1e-4 * np.abs(right).max())
    engine = all_logits(models.load(tmp_path / "out"), IDS[0].numpy())
    np.testing.assert_allclose(engine, found, atol=2e-3 * np.abs(found).max())


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_gains_are_ones_and_matrices_other_ones_of_the_same_length(family: str, tmp_path: Path) -> None:
    make(tmp_path / "model", family)
    run(tmp_path)
    saved, source = open_checkpoint(tmp_path / "out"), open_checkpoint(tmp_path / "model")
    assert saved.config["tie_word_embeddings"] is False
    for name in saved.infos:
        one = saved.read(name)
        two = source.read(name if name in source.infos else "model.embed_tokens.weight")
        if "norm" in name:
            np.testing.assert_array_equal(one, 1)
        elif any(part in name for part in ("embed_tokens", "o_proj", "down_proj")):
            assert np.linalg.norm(one) == pytest.approx(np.linalg.norm(two), rel=1e-4)
            assert np.abs(one - two).max() > 0.1


def test_weights_of_16_bits_are_rounded_once(tmp_path: Path) -> None:
    make(tmp_path / "model", "qwen2", torch.bfloat16)
    stored = open_checkpoint(tmp_path / "model")
    wide = {name: stored.read(name).astype(np.float32) for name in stored.infos}
    (tmp_path / "wide").mkdir()
    (tmp_path / "wide" / "config.json").write_text((tmp_path / "model" / "config.json").read_text())
    write_safetensors(tmp_path / "wide" / "model.safetensors", wide, {"format": "pt"})
    rounded, exact = Rotated(stored, 0), Rotated(open_checkpoint(tmp_path / "wide"), 0)
    for name, info in rounded.infos.items():
        np.testing.assert_array_equal(rounded.read(name), exact.read(name).astype(info.dtype))


def test_rows_read_apart_are_those_of_the_whole(tmp_path: Path) -> None:
    make(tmp_path / "model", "qwen2")
    seen = Rotated(open_checkpoint(tmp_path / "model"), 3)
    for name, info in seen.infos.items():
        whole = seen.read(name)
        assert whole.shape == info.shape
        assert whole.dtype == info.dtype
        np.testing.assert_array_equal(seen.read(name, slice(5, 9)), whole[5:9])


def test_few_bits_cost_less_where_channels_stand_out(tmp_path: Path) -> None:
    """Some columns are thirty times as large as others, and the gains of the norms before them as small."""
    model = make(tmp_path / "model", "llama", initializer_range=0.1)
    with torch.no_grad():
        large = torch.ones(32)
        large[::7] = 30
        for layer in model.model.layers:
            for norm, readers in (
                (layer.input_layernorm, (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)),
                (layer.post_attention_layernorm, (layer.mlp.gate_proj, layer.mlp.up_proj)),
            ):
                norm.weight /= large
                for reader in readers:
                    reader.weight *= large
        model.save_pretrained(tmp_path / "model")
        right = model(input_ids=IDS, use_cache=False).logits[0].numpy()
    off = {}
    for rotate in (True, False):
        out = f"out{rotate}"
        run(tmp_path, out, rotate=rotate, bits=4, group_size=-1)
        saved = open_checkpoint(tmp_path / out)
        decoded = models.reference.Reference(saved, models.read_config(saved)).logits(IDS[0].numpy())
        off[rotate] = np.square(decoded - right).mean()
    assert off[True] < 0.5 * off[False]


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "gptq", "bits": 4, "group_size": 16},
        {"method": "rtn", "bits": 8, "group_size": -1, "activations": "int8"},
        {"method": "gptq", "bits": 3, "group_size": 16, "recover": True},
        {"method": "gptq", "bits": 4, "group_size": 8, "remove_layers": 1, "prune_heads": 0.5, "recover": True},
        {"prune_method": "wanda", "sparsity": 0.5, "budget": "outliers"},
    ],
    ids=["gptq", "w8a8", "recovered", "shrunk", "pruned"],
)
def test_what_comes_after_sees_the_rotated_model(settings: dict[str, Any], tmp_path: Path) -> None:
    make(tmp_path / "model", "llama-tied")
    rows = of_text(tmp_path)
    result = run(tmp_path, **rows, **settings)
    assert result.check["verdict"]
    if settings.get("recover"):
        assert all(its["after"] <= its["before"] < 1 for its in result.recovered.values())
    logits = all_logits(models.load(tmp_path / "out"), IDS[0].numpy())
    if "remove_layers" not in settings:
        right = transformers_logits(tmp_path / "model")
        assert np.corrcoef(logits.ravel(), right.ravel())[0, 1] > 0.5  # along other axes it would be 0
    left = 2

    def stop(*_: float) -> None:
        nonlocal left
        left -= 1
        if not left:
            raise KeyboardInterrupt

    with pytest.raises(PenjingError, match="the same command goes on"):
        run(tmp_path, "killed", progress=stop, **rows, **settings)
    assert run(tmp_path, "killed", **rows, **settings).digest == result.digest


def test_a_real_command_stays_below_its_bound(tmp_path: Path) -> None:
    flags = ["--rotate", "--bits", "8", "--group-size", "-1", "--check", "full", "--json"]
    command = [sys.executable, "-m", "penjing", "compress", str(NOVELIST), "-o", str(tmp_path / "out"), *flags]
    said = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert said["peak_rss_bytes"] <= said["memory_bound_bytes"]
    assert "6 of 6 blocks" in said["check"]["verdict"]
    right, found = (all_logits(models.load(each), IDS[0].numpy()) for each in (NOVELIST, tmp_path / "out"))
    assert np.square(found - right).mean() < 1e-3 * np.square(right).mean()


def test_another_seed_is_another_rotation(tmp_path: Path) -> None:
    make(tmp_path / "model", "llama")
    digests = {run(tmp_path, f"out{number}", seed=seed).digest for number, seed in enumerate((0, 1, 0))}
    assert len(digests) == 2


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("gemma2", r"gemma2 cannot be rotated: model\.layers\.0\.\w+\.weight norms the stream, or what is added"),
        ("olmo2", r"olmo2 cannot be rotated: no norm stands before model.layers.0.self_attn.q_proj"),
        ("gpt_neox", r"gpt_neox cannot be rotated: .* is a layer norm"),
        ("starcoder2", r"starcoder2 cannot be rotated: .* is a layer norm"),
        ("cohere", "rotate takes a family with a description: .*'cohere'"),
    ],
)
def test_what_cannot_be_rotated_is_refused_in_one_line(family: str, reason: str, tmp_path: Path) -> None:
    make(tmp_path / "model", family)
    with pytest.raises(Unsupported, match=reason) as refused:
        run(tmp_path, bits=8, group_size=-1)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_tensors_that_are_not_described_are_refused(tmp_path: Path) -> None:
    make(tmp_path / "model", "llama")
    source = open_checkpoint(tmp_path / "model")
    tensors = {name: source.read(name) for name in source.infos} | {"mtp.proj.weight": np.ones((32, 8), np.float32)}
    write_safetensors(tmp_path / "model" / "model.safetensors", tensors, {"format": "pt"})
    with pytest.raises(Unsupported, match=r"tensor mtp\.proj\.weight is as wide as the stream"):
        run(tmp_path)


def test_the_recipe_says_so() -> None:
    assert build(rotate=True).rules == ()
    assert build("int4", rotate=True).rotate
    assert build(rotate=True, with_data=True).rules == build("balanced").rules
    assert from_json(json.loads(json.dumps(build("int4", rotate=True).to_json()))).rotate
    with pytest.raises(BadRecipe, match="rotate='yes': give true or false"):
        from_json({"version": 1, "rules": [{"quantize": {}}], "rotate": "yes"})
