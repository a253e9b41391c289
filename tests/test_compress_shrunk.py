"""Models that get smaller: against the whole one with zeros where something went, in transformers and in the engine."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from calibrate_models import SHAPE, make, text
from penjing import hardware, models
from penjing.checkpoint import open_checkpoint
from penjing.compress import compress
from penjing.errors import BadInput, BadRecipe, OutOfBudget, PenjingError, Unsupported
from penjing.models.reference import Reference
from penjing.shrink import Shrinking
from stepping import all_logits

IDS = torch.arange(3, 40)[None]
ROWS: dict[str, Any] = {"samples": 10, "sequence_length": 24}
NEURONS = {"prune_neurons": 0.5, "multiple": 8}


def transformers_logits(folder: Path, **kind: Any) -> np.ndarray:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **kind).float().eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits[0].numpy()


def engine_logits(folder: Path) -> np.ndarray:
    return all_logits(models.load(folder), IDS[0].numpy())


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@pytest.fixture
def work(tmp_path: Path) -> Path:
    make(tmp_path / "model", "llama")
    (tmp_path / "text.txt").write_text(text())
    return tmp_path


def run(work: Path, out: str = "out", **changes: Any) -> Any:
    settings = {**ROWS, "calibration": [work / "text.txt"], "shard_bytes": 1, **changes}
    return compress(work / "model", work / out, **settings)


def kept_rows(small: np.ndarray, whole: np.ndarray) -> list[int]:
    """The rows of a matrix that a smaller one has, in order."""
    return [int(np.flatnonzero((whole == row).all(axis=1))[0]) for row in small]


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gemma2", "gemma3_text"])
@pytest.mark.parametrize(
    "settings",
    [NEURONS, {"prune_heads": 0.5}, {"remove_layers": (1,)}, NEURONS | {"prune_heads": 0.5, "remove_layers": (0,)}],
    ids=["neurons", "heads", "layers", "all"],
)
def test_a_smaller_model_is_the_whole_one_with_zeros(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """Without data nothing is moved, so that zeros in the columns that read what went give the same logits."""
    model = make(tmp_path / "model", family)
    compress(tmp_path / "model", tmp_path / "out", shrink_method="l2", **settings)
    saved, config = open_checkpoint(tmp_path / "out"), config_of(tmp_path / "out")
    gone = settings.get("remove_layers", ())
    stay = [number for number in range(3) if number not in gone]
    assert config["num_hidden_layers"] == len(stay)
    model.model.layers = torch.nn.ModuleList([model.model.layers[number] for number in stay])
    for new, layer in enumerate(model.model.layers):
        for reader, maker in ((layer.mlp.down_proj, "mlp.up_proj"), (layer.self_attn.o_proj, "self_attn.q_proj")):
            small = saved.read(f"model.layers.{new}.{maker}.weight")
            whole = layer.get_submodule(maker).weight.detach().numpy()
            mask = np.zeros(len(whole), np.bool_)
            mask[kept_rows(small, whole)] = True
            assert mask.mean() == (0.5 if ("heads" if "attn" in maker else "neurons") in " ".join(settings) else 1)
            reader.weight.data[:, ~torch.from_numpy(mask)] = 0
    model.config.num_hidden_layers = len(stay)
    if kinds := getattr(model.config, "layer_types", None):
        model.config.layer_types = [kinds[number] for number in stay]
    with torch.no_grad():
        expected = model(input_ids=IDS, use_cache=False).logits[0].numpy()
    found = transformers_logits(tmp_path / "out")
    np.testing.assert_allclose(found, expected, atol=2e-4 * np.abs(expected).max())
    np.testing.assert_allclose(engine_logits(tmp_path / "out"), found, atol=2e-3 * np.abs(found).max())


@pytest.mark.parametrize("method", ["l2", "obs", "wanda"])
@pytest.mark.parametrize(
    ("family", "settings", "sizes"),
    [
        ("qwen3_moe", {"prune_experts": 0.5}, {"num_local_experts": 3}),
        ("qwen3_moe", NEURONS, {"moe_intermediate_size": 8, "intermediate_size": 24}),
        ("mixtral", NEURONS | {"prune_experts": 0.5}, {"num_local_experts": 2, "intermediate_size": 24}),
        ("phi3", NEURONS | {"prune_heads": 0.5}, {"num_attention_heads": 2, "intermediate_size": 24}),
        ("gpt_neox", NEURONS, {"intermediate_size": 24}),
        ("gemma2", {"prune_heads": 0.25}, {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}),
    ],
    ids=["experts", "expert neurons", "both", "fused", "biases", "heads"],
)
def test_other_families_load_in_transformers_and_here(
    method: str, family: str, settings: dict[str, Any], sizes: dict[str, int], tmp_path: Path
) -> None:
    make(tmp_path / "model", family)
    (tmp_path / "text.txt").write_text(text())
    result = run(tmp_path, **settings, shrink_method=method)
    config = config_of(tmp_path / "out")
    assert {key: config[key] for key in sizes} == sizes
    assert result.size_bytes < result.original_size_bytes
    found = transformers_logits(tmp_path / "out")
    saved = open_checkpoint(tmp_path / "out")
    reference = Reference(saved, models.read_config(saved)).logits(IDS[0].numpy())
    np.testing.assert_allclose(reference, found, atol=5e-4 * np.abs(found).max())


def test_experts_that_stay_are_those_that_give_most(tmp_path: Path) -> None:
    """One expert's output is made next to nothing: it goes, and the router's rows go with the others' weights."""
    make(tmp_path / "model", "qwen3_moe")
    (tmp_path / "text.txt").write_text(text())
    from safetensors.numpy import load_file, save_file

    tensors = load_file(tmp_path / "model" / "model.safetensors")
    for name in tensors:
        if ".experts.2.down_proj" in name:
            tensors[name] = tensors[name] * 1e-3
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    run(tmp_path, prune_experts=0.17)
    saved = open_checkpoint(tmp_path / "out")
    for layer in range(3):
        at = f"model.layers.{layer}.mlp"
        router = saved.read(f"{at}.gate.weight")
        assert kept_rows(router, tensors[f"{at}.gate.weight"]) == [0, 1, 3, 4, 5]
        for new, old in enumerate([0, 1, 3, 4, 5]):
            up = saved.read(f"{at}.experts.{new}.up_proj.weight")
            np.testing.assert_array_equal(up, tensors[f"{at}.experts.{old}.up_proj.weight"])


def test_what_stays_is_fitted_to_what_the_whole_block_made(work: Path) -> None:
    """The first block's down is the least squares fit on inputs that a plain run of transformers shows."""
    import transformers

    run(work, **NEURONS)
    saved = open_checkpoint(work / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(work / "model").float().eval()
    down, rows = model.model.layers[0].mlp.down_proj, []
    down.register_forward_pre_hook(lambda _, args: rows.append(args[0].flatten(0, -2).numpy()))
    tokens = torch.tensor([int(word[1:]) for word in text().split()[: 10 * 24]]).reshape(10, 24)
    with torch.no_grad():
        model(input_ids=tokens)
    x, w = np.concatenate(rows).astype(np.float64), down.weight.detach().numpy().astype(np.float64)
    up = model.model.layers[0].mlp.up_proj.weight.detach().numpy()
    kept = kept_rows(saved.read("model.layers.0.mlp.up_proj.weight"), up)
    assert len(kept) == 24
    ridge = 0.01 * np.square(x).mean()
    stacked = np.concatenate([x / np.sqrt(len(x)), np.sqrt(ridge) * np.eye(48)])
    expected = np.linalg.lstsq(stacked[:, kept], stacked @ w.T, rcond=None)[0].T
    found = saved.read("model.layers.0.mlp.down_proj.weight")
    np.testing.assert_allclose(found, expected, atol=2e-3 * np.abs(expected).max())
    lost = json.loads((work / "out" / "penjing.json").read_text())["shrunk"]["lost"]["model.layers.0.mlp.down_proj"]
    right = np.square(x @ w.T - x[:, kept] @ found.T).sum() / np.square(x @ w.T).sum()
    assert lost == pytest.approx(right, rel=1e-2)


def test_layers_of_the_least_influence_go(work: Path) -> None:
    import transformers

    run(work, remove_layers=1)
    model = transformers.AutoModelForCausalLM.from_pretrained(work / "model").float().eval()
    tokens = torch.tensor([int(word[1:]) for word in text().split()[: 10 * 24]]).reshape(10, 24)
    with torch.no_grad():
        states = list(model(input_ids=tokens, output_hidden_states=True).hidden_states)
        states[-1] = None
        last: list[Any] = []
        model.model.norm.register_forward_pre_hook(lambda _, args: last.append(args[0]))
        model(input_ids=tokens)
    states[-1] = last[0]
    cosines = [torch.nn.functional.cosine_similarity(a, b, dim=-1).mean() for a, b in itertools.pairwise(states)]
    shrunk = json.loads((work / "out" / "penjing.json").read_text())["shrunk"]
    np.testing.assert_allclose(shrunk["influence"], [1 - float(each) for each in cosines], rtol=1e-3)
    assert shrunk["layers"] == [n for n in range(3) if n != int(np.argmin(shrunk["influence"]))]
    assert shrunk["sizes"] == {"num_hidden_layers": [3, 2]}


@pytest.mark.parametrize("bits", [{"bits": 4, "group_size": 8}, {"method": "gptq", "bits": 4, "group_size": 8}])
def test_shrunk_and_quantized_in_one_run(bits: dict[str, Any], work: Path) -> None:
    """As shrinking first and quantizing what came out in a second run."""
    both = {**NEURONS, "prune_heads": 0.5, "remove_layers": 1}
    whole = run(work, "both", **both, **bits)
    run(work, "shrunk", **both)
    (work / "model").rename(work / "original")
    (work / "shrunk").rename(work / "model")
    apart = run(work, "apart", **bits)
    one, two = open_checkpoint(work / "both"), open_checkpoint(work / "apart")
    assert one.infos.keys() == two.infos.keys()
    for name in one.infos:
        np.testing.assert_array_equal(one.read(name), two.read(name), err_msg=name)
    assert whole.digest == apart.digest
    assert config_of(work / "both")["num_hidden_layers"] == 2
    np.testing.assert_allclose(engine_logits(work / "both"), engine_logits(work / "apart"))


def stop_after(lines: int, work: Path, **changes: Any) -> None:
    def announce(_: str) -> None:
        nonlocal lines
        lines -= 1
        if not lines:
            raise KeyboardInterrupt

    with pytest.raises(PenjingError, match="the same command goes on from there"):
        run(work, announce=announce, **changes)


ALL: dict[str, Any] = {**NEURONS, "prune_heads": 0.5, "remove_layers": 1, "method": "gptq", "bits": 4, "group_size": 8}


@pytest.mark.parametrize("writes", [1, 2, 3, 4, 5, 6, 7, 9, 12])
def test_an_interrupted_run_ends_with_the_same_bytes(writes: int, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped before each of the files that are written while layers and units are chosen, and afterwards."""
    import penjing.checkpoint.safetensors as files

    whole = run(work, "whole", **ALL)
    real, left = files.replacing, writes

    def failing(path: Path) -> Any:
        nonlocal left
        left -= 1
        if not left:
            raise KeyboardInterrupt
        return real(path)

    with monkeypatch.context() as patched:
        patched.setattr(files, "replacing", failing)
        with pytest.raises((PenjingError, KeyboardInterrupt)):
            run(work, **ALL)
    again = run(work, **ALL)
    assert again.digest == whole.digest
    assert (work / "out" / "penjing.json").read_bytes() == (work / "whole" / "penjing.json").read_bytes()
    assert not (work / "out" / ".journal").exists()
    assert run(work, **ALL).already_done


def test_other_settings_in_the_same_folder_are_refused(work: Path) -> None:
    stop_after(2, work, **ALL)
    with pytest.raises(BadInput, match="another recipe"):
        run(work, **ALL | {"prune_heads": 0.25})
    with pytest.raises(BadInput, match="another calibration"):
        run(work, **ALL | {"samples": 9})


FAULTS: dict[str, tuple[str, dict[str, Any], type[BadInput], str]] = {
    "too many layers": ("llama", {"remove_layers": 3}, BadRecipe, "the model has 3, numbered from 0"),
    "no such layer": ("llama", {"remove_layers": (3,)}, BadRecipe, "the model has 3, numbered from 0"),
    "too few neurons": ("llama", {"prune_neurons": 0.01, "multiple": 8}, BadRecipe, "less than half of 8 of"),
    "no experts": ("llama", {"prune_experts": 0.5}, BadRecipe, "has no experts"),
    "fewer than chosen": ("qwen3_moe", {"prune_experts": 0.9}, BadRecipe, "would keep 1 of 6 experts; 2 to 5"),
    "group size": ("llama", {"prune_neurons": 0.5, "multiple": 6, "bits": 4, "group_size": 16}, BadRecipe, "divide"),
    "no text": ("llama", {"prune_neurons": 0.5, "calibration": ["absent.txt"]}, BadInput, "there is no such file"),
    "unknown method": ("llama", {"prune_neurons": 0.5, "shrink_method": "l3"}, BadRecipe, "known: l1, l2, obs"),
    "share": ("llama", {"prune_neurons": 1.0}, BadRecipe, "neurons=1.0"),
    "layers": ("llama", {"remove_layers": -1}, BadRecipe, "layers=-1"),
    "undescribed": ("cohere", {"prune_neurons": 0.5}, Unsupported, "not a family with a description"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_shrink_is_one_line(fault: str, tmp_path: Path) -> None:
    family, settings, kind, message = FAULTS[fault]
    make(tmp_path / "model", family)
    (tmp_path / "text.txt").write_text(text())
    with pytest.raises(kind, match=message) as caught:
        run(tmp_path, **settings)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_without_text_the_model_writes_its_own(work: Path) -> None:
    said: list[str] = []
    settings = {**NEURONS, "remove_layers": 1, "calibration": [], "samples": 4}
    first = run(work, "one", **settings, announce=said.append)
    assert any(line.startswith("NO CALIBRATION TEXT") for line in said)
    assert first.digest == run(work, "two", **settings).digest


def test_a_limit_that_cannot_be_kept_is_refused(work: Path) -> None:
    with pytest.raises(OutOfBudget, match="need"):
        run(work, **NEURONS, memory_limit=1000)


def test_neurons_stay_in_multiples_that_do_not_divide_what_there_was(work: Path) -> None:
    run(work, prune_neurons=0.5, multiple=20, shrink_method="l2")
    assert json.loads((work / "out" / "config.json").read_text())["intermediate_size"] == 20  # of 48
    with pytest.raises(BadRecipe, match="kept in multiples of 100"):
        run(work, "none", prune_neurons=0.5, multiple=100, shrink_method="l2")


def test_what_choosing_took_is_not_counted_twice(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that was in use while units were chosen neither refuses the rest nor changes its batch, so its bytes."""
    plain = run(work, "plain", **ALL)
    identity = json.loads((work / "plain" / "penjing.json").read_text())["identity"]
    peak, real = hardware.peak_memory_bytes(), Shrinking.decide
    taken = 0

    def decide(*args: Any) -> Any:
        nonlocal taken
        taken = plain.memory_bound_bytes
        return real(*args)

    monkeypatch.setattr(Shrinking, "decide", decide)
    monkeypatch.setattr(hardware, "peak_memory_bytes", lambda: peak + taken)
    tight = run(work, **ALL, memory_limit=plain.memory_bound_bytes + (16 << 20))
    assert tight.digest == plain.digest
    assert json.loads((work / "out" / "penjing.json").read_text())["identity"] == identity


def test_channels_are_neurons_by_another_name(work: Path) -> None:
    one = run(work, "one", pattern="channel", sparsity=0.5, prune_method="l2", multiple=8)
    two = run(work, "two", prune_neurons=0.5, shrink_method="l2", multiple=8)
    assert one.digest == two.digest
    assert SHAPE["intermediate_size"] == 2 * config_of(work / "one")["intermediate_size"]


def test_no_data_is_needed_for_a_random_choice(work: Path) -> None:
    result = compress(work / "model", work / "out", prune_neurons=0.5, multiple=8, shrink_method="random")
    assert result.calibration is None
    assert result.shrunk["sizes"] == {"intermediate_size": (48, 24)}


def test_a_gguf_file_shrinks_too(tmp_path: Path) -> None:
    """Its integers are read as numbers."""
    from penjing import export

    make(tmp_path / "model", "llama", intermediate_size=64)
    (tmp_path / "model" / "tokenizer.json").unlink()
    compress(tmp_path / "model", tmp_path / "int8", bits=8, group_size=32)
    export(tmp_path / "int8", tmp_path / "int8.gguf", format="gguf")
    compress(tmp_path / "int8.gguf", tmp_path / "out", prune_neurons=0.5, shrink_method="l2", multiple=32)
    saved, whole = open_checkpoint(tmp_path / "out"), open_checkpoint(tmp_path / "int8.gguf")
    small = saved.read("model.layers.1.mlp.up_proj.weight")
    assert len(kept_rows(small, whole.read("model.layers.1.mlp.up_proj.weight"))) == 32
