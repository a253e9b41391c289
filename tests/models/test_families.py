"""Every family against transformers, on tiny models with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from variants import VARIANTS

from penjing import models
from penjing.checkpoint import open_checkpoint
from penjing.errors import BadCheckpoint, BadInput, Unsupported
from penjing.models.config import KvLayer
from penjing.models.reference import Reference
from penjing.models.weights import check_tensors
from stepping import all_logits, chunk, table

# What the kernels compute; the reference computes all.
RNG = np.random.default_rng(7)


def tokens(count: int) -> np.ndarray:
    return RNG.integers(0, 97, count)


def expected(model: Any, ids: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.tensor(ids[None])).logits[0].numpy()


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers(variant: str, tiny: Any) -> None:
    family, changes = VARIANTS[variant]
    oracle, folder = tiny(family, **changes)
    ids = tokens(41)
    model = models.load(folder, length=len(ids))
    logits = all_logits(model, ids)
    np.testing.assert_allclose(logits, expected(oracle, ids), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_reference_equals_transformers(variant: str, tiny: Any) -> None:
    family, changes = VARIANTS[variant]
    oracle, folder = tiny(family, **changes)
    checkpoint = open_checkpoint(folder)
    config = models.read_config(checkpoint)
    check_tensors(checkpoint, config)
    ids = tokens(41)
    logits, right = Reference(checkpoint, config).logits(ids), expected(oracle, ids)
    np.testing.assert_allclose(logits, right, atol=2e-4, rtol=1e-4)
    assert np.isfinite(right).all()
    assert right.std() > 0.1
    assert config.parameters == sum(info.size for info in checkpoint.infos.values())


MIXED = ["llama", "mistral-window", "qwen3", "gemma3", "mixtral", "gpt_oss", "qwen3_next", "deepseek_v3"]


@pytest.mark.parametrize("variant", MIXED)
def test_a_batch_of_prefills_and_decodes_is_the_same_as_each_alone(variant: str, tiny: Any) -> None:
    family, changes = VARIANTS[variant]
    oracle, folder = tiny(family, **changes)
    model = models.load(folder)
    model.reserve(6, "float32", 3)
    texts, done = [tokens(30), tokens(17), tokens(9)], [0, 0, 0]
    # Each round gives every sequence a chunk of another size; some are prefilled while others decode.
    for sizes in ([11, 1, 3], [1, 15, 4], [17, 1, 1], [1, 0, 1]):
        chosen = [index for index, size in enumerate(sizes) if size]
        chunks = [chunk(texts[i][done[i] : done[i] + sizes[i]], done[i], 2 * i, slot=i) for i in chosen]
        for rows, index in zip(model.logits(chunks), chosen, strict=True):
            done[index] += sizes[index]
            right = expected(oracle, texts[index][: done[index]])[-1]
            np.testing.assert_allclose(rows[-1], right, atol=2e-4, rtol=1e-4)
    assert done == [30, 17, 9]


def test_what_is_written_again_counts(tiny: Any) -> None:
    oracle, folder = tiny("llama")
    model = models.load(folder)
    model.reserve(1, "float32")
    first, wrong, right = tokens(8), tokens(6), tokens(5)
    model.logits([chunk(np.concatenate([first, wrong]))])
    logits = model.logits([chunk(right, 8)])[0][-1]
    np.testing.assert_allclose(logits, expected(oracle, np.concatenate([first, right]))[-1], atol=2e-4)


def test_chunks_that_cannot_be_are_refused(tiny: Any) -> None:
    _, folder = tiny("llama")
    model = models.load(folder)
    model.reserve(2, "float32")
    for wrong, message in [
        (chunk([97]), "token 97 is outside the vocabulary of 97"),
        (models.Chunk(np.arange(40, dtype=np.int32), 0, table(32)), "table"),
        (models.Chunk(np.arange(4, dtype=np.int32), 0, np.array([2], np.int32)), "block"),
        (chunk([1], 10_000), "position"),
    ]:
        with pytest.raises(BadInput, match=message):
            model.step([wrong])


@pytest.mark.parametrize(
    "variant", ["llama", "qwen2-window", "gemma2", "gemma4", "gemma4-shared", "granite", "gpt_neox", "qwen3_next"]
)
def test_streaming_block_by_block_gives_the_same_logits(variant: str, tiny: Any) -> None:
    family, changes = VARIANTS[variant]
    oracle, folder = tiny(family, **changes)
    stream = models.stream(folder)
    windows = [tokens(33), tokens(33), tokens(12)]
    x = np.empty((78, stream.config.hidden), np.float32)
    stream.embed(np.concatenate(windows), x)
    for block in stream.blocks():
        stream.run(block, x, [33, 33, 12])
    norm, head = stream.head()
    logits = stream.logits(x, norm, head)
    right = np.concatenate([expected(oracle, window) for window in windows])
    # The rounding of 33 states, one after another, is amplified: both are so far from float64.
    atol = 1e-3 if variant == "qwen3_next" else 2e-4
    np.testing.assert_allclose(logits, right, atol=atol, rtol=1e-4)


def test_long_prefill_passes_several_rows_of_queries(tiny: Any) -> None:
    oracle, folder = tiny("mistral", sliding_window=70, max_position_embeddings=512)
    model = models.load(folder)
    ids = tokens(300)
    logits = all_logits(model, ids)
    np.testing.assert_allclose(logits, expected(oracle, ids), atol=3e-4, rtol=1e-4)


def test_numbers_of_a_model(tiny: Any) -> None:
    _, folder = tiny("llama", eos_token_id=[3, 5], bos_token_id=2, tie_word_embeddings=True)
    model = models.load(folder)
    config = model.config
    assert (config.family, config.layers, config.kv_layers) == ("llama", 3, (KvLayer(2, 6, 6),) * 3)
    assert (config.bos_token_id, config.eos_token_ids) == (2, (3, 5))
    numbers = 32 * 2 * 3 * 2 * 6 * 4
    assert numbers <= model.block_bytes("float32") <= 2 * numbers  # a layer of a block is padded to whole vectors
    block = 24 * 24 * 2 + 12 * 24 * 2 + 3 * 44 * 24
    # resident, so with the padding of the kernels' panels (sixteen rows by sixteen columns)
    least = 4 * (97 * 24 + 3 * block)
    assert least <= model.weights_bytes <= 2 * least


def edit(folder: Path, **changes: Any) -> Path:
    values = json.loads((folder / "config.json").read_text())
    values.update(changes)
    (folder / "generation_config.json").unlink()
    (folder / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v != "absent"}))
    return folder


@pytest.mark.parametrize("scaling", [None, {"type": "linear", "factor": 2.0}, {"rope_type": "linear", "factor": 2.0}])
def test_older_names_of_rotary_settings(scaling: Any, tiny: Any) -> None:
    parameters = {"rope_theta": 300.0, "rope_type": "linear" if scaling else "default", "factor": 2.0}
    _, folder = tiny("llama", rope_parameters=parameters)
    new = models.load(folder)
    old = models.load(edit(folder, rope_parameters="absent", rope_theta=300.0, rope_scaling=scaling))
    assert old.config == new.config


def test_end_tokens_of_generation_config_go_first(tiny: Any) -> None:
    _, folder = tiny("llama", eos_token_id=3)
    (folder / "generation_config.json").write_text('{"eos_token_id": [4, 6]}')
    assert models.load(folder).config.eos_token_ids == (4, 6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "lama"}, "did you mean 'llama'"),
        ({"model_type": "absent"}, "model_type is missing"),
        ({"hidden_size": "absent"}, "hidden_size is missing"),
        ({"hidden_size": "24"}, "hidden_size = '24', expected a positive integer"),
        ({"vocab_size": 0}, "vocab_size = 0"),
        ({"num_hidden_layers": True}, "num_hidden_layers = True"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings"),
        ({"num_key_value_heads": 3}, "num_key_value_heads = 3, expected a divisor"),
        ({"head_dim": 5}, "head_dim = 5, expected an even"),
        ({"head_dim": 578}, "head_dim = 578; heads of up to 576 are computed"),
        ({"num_hidden_layers": 5000}, "num_hidden_layers = 5000, expected 1 to 4096"),
        ({"hidden_act": "sillu"}, "hidden_act = 'sillu'; did you mean 'silu'"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "short_factor of the rotary positions"),
        ({"rope_parameters": {"rope_type": "yarrn", "factor": 2.0}}, "did you mean 'yarn'"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor of the rotary positions"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "beta_fasts": 1}}, "did you mean 'beta_fast'"),
        ({"rope_parameters": {"rope_theta": 5.0, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_theta": 77.0}, "rope_theta = 77.0 contradicts"),
        ({"rope_parameters": 3}, "rope_parameters = 3, expected an object"),
        ({"num_hidden_layers": 4}, "model.layers.3.input_layernorm.weight is missing"),
        ({"intermediate_size": 40}, r"mlp.gate_proj.weight has shape \(44, 24\), config.json calls for \(40, 24\)"),
        ({"attention_bias": True}, "q_proj.bias is missing"),
    ],
)
def test_bad_configurations_are_refused_by_name(changes: Any, message: str, tiny: Any) -> None:
    _, folder = tiny("llama")
    with pytest.raises((BadCheckpoint, Unsupported), match=message) as caught:
        models.load(edit(folder, **changes))
    assert "\n" not in str(caught.value)
