"""Families without a description: transformers' graph on Penjing's kernels, against transformers itself."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import penjing
from penjing import models
from penjing.checkpoint import open_checkpoint
from penjing.checkpoint.safetensors import read_safetensors, write_safetensors
from penjing.errors import BadCheckpoint, BadInput, Unsupported
from tiny_graphs import GRAPHS, make_graph

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
TOKENS = np.random.default_rng(7).integers(3, 97, 23)


def oracle_logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(TOKENS[None])).logits[0].numpy()


def rewrite(folder: Path, change: Any, **values: Any) -> Path:
    """The folder with its tensors and config.json changed."""
    tensors, _ = read_safetensors(folder / "model.safetensors")
    write_safetensors(folder / "model.safetensors", change(tensors), {"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("family", GRAPHS)
def test_logits_are_those_of_transformers_however_the_text_is_cut(family: str, tmp_path: Path) -> None:
    right = oracle_logits(make_graph(tmp_path / family, family))
    graph = models.load_any(tmp_path / family)
    np.testing.assert_allclose(graph.logits(0, TOKENS, 0, 23), right, atol=1e-4, rtol=1e-4)
    for first in (1, 6, 17):
        rows = [graph.logits(1, TOKENS[:first], 0, first), graph.logits(1, TOKENS[first:21], first, 21 - first)]
        rows += [graph.logits(1, TOKENS[place : place + 1], place, 1) for place in (21, 22)]
        np.testing.assert_allclose(np.concatenate(rows), right, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", GRAPHS)
def test_no_large_weight_is_left_to_torch(family: str, tmp_path: Path) -> None:
    make_graph(tmp_path / family, family)
    graph = models.load_any(tmp_path / family)
    left = {name: each.shape for name, each in graph.graph.named_parameters() if each.numel() >= 32 * 32}
    assert not left
    stored = sum(info.size for info in open_checkpoint(tmp_path / family).infos.values())
    buffers = sum(each.nbytes for each in graph.graph.buffers())
    padding = 4 * 64 * 64 * 16  # kernels lay rows out in blocks
    assert 4 * stored <= graph.weights_bytes <= 4 * stored + buffers + padding


@pytest.mark.parametrize("recipe", ["int4", "int8", "w8a8", "sparse"])
@pytest.mark.parametrize("family", ["opt", "falcon", "stablelm", "cohere", "mamba", "phimoe"])
def test_compressed_ones_compute_what_their_integers_stand_for(family: str, recipe: str, tmp_path: Path) -> None:
    settings: dict[str, dict[str, Any]] = {
        "int4": {"bits": 4, "group_size": 8, "symmetric": False},
        "int8": {"bits": 8, "group_size": 16},
        "w8a8": {"recipe": "w8a8"},
        "sparse": {"bits": 4, "group_size": 8, "prune_method": "l1", "sparsity": 0.5, "sparse_storage": "bitmask"},
    }
    original = make_graph(tmp_path / "plain", family)
    result = penjing.compress(tmp_path / "plain", tmp_path / "small", check="full", **settings[recipe])
    assert "as served agree with the plain computation" in result.check["verdict"]
    assert result.check["products_error"] < (0.05 if recipe == "w8a8" else 1e-5)
    saved = open_checkpoint(tmp_path / "small")
    assert any(saved.is_compressed(name.removesuffix(".weight")) for name in saved.names)
    rewrite(tmp_path / "plain", lambda tensors: {n: saved.tensor(n).astype(np.float32) for n in saved.names})
    right = oracle_logits(type(original).from_pretrained(tmp_path / "plain").float().eval())
    if recipe != "w8a8":  # which rounds its inputs in any case
        exact = models.load_any(tmp_path / "small", activations="float").logits(0, TOKENS, 0, 23)
        np.testing.assert_allclose(exact, right, atol=1e-4, rtol=1e-4)
    served = models.load_any(tmp_path / "small").logits(0, TOKENS, 0, 23)
    error = np.sqrt(np.square(served - right).mean() / np.square(right).mean())
    assert 1e-6 < error < (0.2 if family == "phimoe" else 0.1)  # a token may go to another expert


@pytest.mark.filterwarnings("ignore")  # torch and transformers warn about each other's names
@pytest.mark.parametrize("family", ["opt", "stablelm"])
def test_transformers_loads_the_same_artifact_to_the_same_logits(family: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    make_graph(tmp_path / "plain", family)
    penjing.compress(tmp_path / "plain", tmp_path / "small", bits=4, group_size=16)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.float32).eval()
    ours = models.load_any(tmp_path / "small", activations="float").logits(0, TOKENS, 0, 23)
    np.testing.assert_allclose(ours, oracle_logits(loaded), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("family", ["gpt2", "bloom"])
def test_published_names_without_the_prefix(family: str, tmp_path: Path) -> None:
    right = oracle_logits(make_graph(tmp_path / "a", family))
    rewrite(tmp_path / "a", lambda tensors: {n.removeprefix("transformer."): t for n, t in tensors.items()})
    np.testing.assert_allclose(models.load_any(tmp_path / "a").logits(0, TOKENS, 0, 23), right, atol=1e-4, rtol=1e-4)


def test_a_head_of_its_own_is_used(tmp_path: Path) -> None:
    right = oracle_logits(make_graph(tmp_path / "a", "opt", tie_word_embeddings=False))
    graph = models.load_any(tmp_path / "a")
    np.testing.assert_allclose(graph.logits(0, TOKENS, 0, 23), right, atol=1e-4, rtol=1e-4)
    assert graph.read_bytes < graph.weights_bytes


def test_a_tied_head_takes_its_memory_once(tmp_path: Path) -> None:
    make_graph(tmp_path / "tied", "opt")
    make_graph(tmp_path / "apart", "opt", tie_word_embeddings=False)
    tied, apart = models.load_any(tmp_path / "tied"), models.load_any(tmp_path / "apart")
    assert apart.weights_bytes - tied.weights_bytes >= 4 * 97 * 32
    assert tied.read_bytes < tied.weights_bytes  # a row of the positions is read, the embedding is also the head


def test_caches_are_counted_as_they_are(tmp_path: Path) -> None:
    make_graph(tmp_path / "opt", "opt")
    make_graph(tmp_path / "mamba", "mamba")
    attention, recurrent = models.load_any(tmp_path / "opt"), models.load_any(tmp_path / "mamba")
    assert (attention.block_bytes("float32"), attention.state_bytes) == (32 * 2 * 2 * 32 * 4, 0)
    assert (recurrent.block_bytes("float32"), recurrent.state_bytes) == (0, 2 * 48 * (8 + 4) * 4)
    assert recurrent.has_state
    assert not attention.has_state


def test_one_line_says_that_it_is_slower(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_graph(tmp_path / "opt", "opt")
    with caplog.at_level(logging.WARNING, "penjing"):
        models.load_any(tmp_path / "opt")
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / 'opt'}: model_type 'opt' has no description: computed by transformers' graph with Penjing's"
        " kernels, slower"
    ]


def test_without_torch_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_graph(tmp_path / "opt", "opt")
    find = models.importlib.util.find_spec
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None if name == "torch" else find(name))
    for open_it in (models.load_any, models.texts):
        with pytest.raises(Unsupported, match=r"torch is not installed: pip install 'penjing\[compress\]'"):
            open_it(tmp_path / "opt")


def test_refusals(tmp_path: Path) -> None:
    make_graph(tmp_path / "a", "opt")
    tensors, _ = read_safetensors(tmp_path / "a" / "model.safetensors")
    norm, matrix = "model.decoder.final_layer_norm.bias", "model.decoder.layers.0.fc1.weight"
    for name, wrong in ((norm, "missing"), (matrix, "missing"), (norm, "shape"), (matrix, "shape")):
        others = {other: tensor for other, tensor in tensors.items() if other != name}
        if wrong == "shape":
            others[name] = np.ones((7, 3) if name == matrix else 7, np.float32)
        rewrite(tmp_path / "a", lambda _, others=others: others)
        with pytest.raises(BadCheckpoint, match=rf"{name}.*{wrong}"):
            models.load_any(tmp_path / "a")
    rewrite(tmp_path / "a", lambda _: tensors, model_type="llamoid")
    with pytest.raises(Unsupported, match=r"neither Penjing nor transformers .* knows this family"):
        models.load_any(tmp_path / "a")


def test_a_model_that_sees_what_comes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from penjing.models.foreign import graph

    make_graph(tmp_path / "opt", "opt")
    forward = graph.Graph._forward

    def leaks(self: Any, slot: int, tokens: Any, rows: int) -> Any:
        return forward(self, slot, tokens, rows) * len(tokens)

    monkeypatch.setattr(graph.Graph, "_forward", leaks)
    with pytest.raises(Unsupported, match="does not compute the same token by token"):
        models.load_any(tmp_path / "opt")


def test_code_in_the_folder_never_runs(tmp_path: Path) -> None:
    make_graph(tmp_path / "a", "opt")
    (tmp_path / "a" / "evil.py").write_text("raise SystemExit('run')")
    code = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    tensors, _ = read_safetensors(tmp_path / "a" / "model.safetensors")
    models.load_any(rewrite(tmp_path / "a", lambda _: tensors, auto_map=code))
    rewrite(tmp_path / "a", lambda _: tensors, model_type="evil")
    with pytest.raises(Unsupported, match="neither"):
        models.load_any(tmp_path / "a")


def test_what_cannot_follow_is_refused(tmp_path: Path) -> None:
    make_graph(tmp_path / "opt", "opt")
    graph = models.load_any(tmp_path / "opt")
    graph.logits(0, TOKENS[:5], 0, 1)
    with pytest.raises(BadInput, match="position 7 does not follow"):
        graph.logits(0, TOKENS[:5], 7, 1)
    with pytest.raises(BadInput, match="float32"):
        graph.reserve(4, "int8", 1)


def test_evaluate_gives_the_loss_of_transformers(tmp_path: Path) -> None:
    from penjing.models.tokenizer import Tokenizer

    novelist = Path(penjing.__file__).parents[2] / "examples" / "novelist"
    oracle = make_graph(tmp_path / "a", "opt", vocab_size=4096)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "a" / name).write_bytes((novelist / name).read_bytes())
    text = (novelist / "evaluation.txt").read_text()[:900]
    ids = torch.tensor(Tokenizer(tmp_path / "a").encode(text))
    found = penjing.evaluate(tmp_path / "a", [text], tmp_path / "a", context_length=20, stride=15)
    losses, done = [], 1
    for start in range(0, len(ids), 15):
        window = ids[start : start + 20]
        with torch.no_grad():
            logs = oracle(window[None]).logits[0].log_softmax(-1)
        each = -logs[:-1].gather(1, window[1:, None])[:, 0]
        losses += each[max(0, done - start - 1) :].tolist()
        done = start + len(window)
        if done >= len(ids):
            break
    assert found.tokens == len(losses)
    assert found.loss == pytest.approx(np.mean(losses), abs=1e-4)
    assert (found.loss_change, found.top1_agreement) == (0, 1)
