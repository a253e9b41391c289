"""Configurations of published models: sizes against what is known of them, and against transformers' own modules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from penjing.models.config import Attention, DeltaNet, Experts, LatentAttention
from penjing.models.families import describe

FILE = Path(__file__).parents[1] / "data/configs/published.jsonl"
PUBLISHED = {line["model"]: line for line in map(json.loads, FILE.read_text().splitlines())}


def described(model: str) -> Any:
    return describe(PUBLISHED[model]["config"], model)


@pytest.mark.parametrize("model", PUBLISHED)
def test_parameters_of_published_models(model: str) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = PUBLISHED[model]["config"]
    config = {**config.get("text_config", config)}
    built = transformers.AutoConfig.for_model(**config)
    with torch.device("meta"):
        oracle = transformers.AutoModelForCausalLM.from_config(built)
    stored = oracle.state_dict()
    buffers = sum(buffer.numel() for name, buffer in oracle.named_buffers() if name in stored)
    parameters = sum(parameter.numel() for parameter in oracle.parameters()) + buffers
    assert described(model).parameters == parameters
    assert PUBLISHED[model]["parameters"] in (None, parameters)


def test_memory_of_published_models() -> None:
    llama, deepseek = described("meta-llama/Meta-Llama-3-8B-Instruct"), described("deepseek-ai/DeepSeek-V3")
    assert llama.kv_bytes_per_token == 32 * 2 * 8 * 128 * 4
    assert deepseek.kv_bytes_per_token == 61 * (576 + 512) * 4
    hybrid = described("Qwen/Qwen3.5-35B-A3B")
    assert [layer is None for layer in hybrid.kv_layers] == [True, True, True, False] * 10
    assert hybrid.kv_bytes_per_token == 10 * 2 * 2 * 256 * 4
    assert hybrid.state_bytes == 30 * (32 * 128 * 128 + 8192 * 3) * 4


def test_what_published_models_say_of_themselves() -> None:
    deepseek = described("deepseek-ai/DeepSeek-V3")
    mixer, mlp = deepseek.blocks[3].mixer, deepseek.blocks[3].mlp
    assert isinstance(mixer, LatentAttention)
    assert mixer.scale == pytest.approx(192**-0.5 * 1.3689**2, rel=1e-4)  # YaRN at forty times
    assert isinstance(mlp, Experts)
    assert (mlp.count, mlp.top_k, mlp.groups, mlp.top_groups, mlp.scale) == (256, 8, 8, 4, 2.5)
    gemma = described("google/gemma-4-26B-A4B")
    attention = gemma.blocks[5].mixer
    assert isinstance(attention, Attention)
    assert (attention.head_dim, attention.kv_heads, attention.window, attention.values_are_keys) == (512, 2, None, True)
    assert gemma.eos_token_ids == (1,)
    assert sum(each > 0 for each in attention.rope.frequencies) == 64
    assert isinstance(described("Qwen/Qwen3.5-35B-A3B").blocks[0].mixer, DeltaNet)
    oss = described("openai/gpt-oss-20b")
    assert [block.mixer.window for block in oss.blocks[:3]] == [128, None, 128]
    phi = described("microsoft/Phi-3.5-mini-instruct")
    assert (
        phi.for_length(4096).blocks[0].mixer.rope.frequencies[1]
        > phi.for_length(4097).blocks[0].mixer.rope.frequencies[1]
    )
