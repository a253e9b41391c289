"""Weights of floats as compress writes them: the numbers and logits that transformers reads, and Penjing's own."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from calibrate_models import make, text
from penjing import models
from penjing.checkpoint import open_checkpoint
from penjing.checkpoint.describe import describe
from penjing.compress import compress
from penjing.errors import BadCheckpoint, BadRecipe, Unsupported
from penjing.export import export
from penjing.formats.floats import FloatTensor
from stepping import all_logits
from test_compress_consumers import ids
from tiny_llama import NOVELIST, llama_tensors, make_model

SCHEMES = ["fp8", "fp8_dynamic", "fp8_block", "mxfp4a16", "nvfp4a16"]
ROWS: dict[str, Any] = {"calibration": [NOVELIST / "evaluation.txt"], "samples": 4, "sequence_length": 64}
# torch 2.13 and transformers warn about each other's names while they load a compressed model.
quietly = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("artifacts")
    for scheme in SCHEMES:
        compress(NOVELIST, folder / scheme, scheme, **(ROWS if scheme == "fp8" else {}))
    return {scheme: folder / scheme for scheme in SCHEMES}


def theirs(folder: Path, dtype: torch.dtype, **how: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **how).eval()


@quietly
@pytest.mark.parametrize("scheme", SCHEMES)
def test_transformers_decodes_the_same_numbers(scheme: str, artifacts: dict[str, Path]) -> None:
    loaded = theirs(artifacts[scheme], torch.bfloat16)
    with torch.no_grad():
        loaded(torch.tensor([[1]]))  # which has compressed-tensors decode
    checkpoint = open_checkpoint(artifacts[scheme])
    assert len(checkpoint.compressed) == 42
    for module in checkpoint.compressed:
        found = loaded.get_submodule(module).weight.detach().float().numpy()
        np.testing.assert_array_equal(found, checkpoint.tensor(f"{module}.weight").astype(np.float32))


@quietly
@pytest.mark.parametrize("scheme", SCHEMES)
def test_logits_are_those_of_transformers(scheme: str, artifacts: dict[str, Path]) -> None:
    how = {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)}
    loaded = theirs(artifacts[scheme], torch.float32, **how)
    with torch.no_grad():
        right = loaded(torch.tensor([ids()])).logits[0].numpy()
    np.testing.assert_allclose(all_logits(models.load(artifacts[scheme], activations="float"), ids()), right, atol=2e-3)
    served = all_logits(models.load(artifacts[scheme]), ids())
    np.testing.assert_allclose(served, right, atol=0.5)  # inputs of MXFP4 are rounded to int8


@quietly
@pytest.mark.parametrize("scheme", ["fp8", "fp8_dynamic", "fp8_block"])
def test_inputs_are_rounded_by_readers_as_config_says(scheme: str, artifacts: dict[str, Path]) -> None:
    """transformers' logits are those of the decoded weights with each input rounded to E4M3 here."""
    folder = artifacts[scheme]
    loaded = theirs(folder, torch.bfloat16)
    plain = transformers.AutoModelForCausalLM.from_pretrained(NOVELIST, dtype=torch.bfloat16).eval()
    checkpoint = open_checkpoint(folder)

    def rounded(module: str, x: torch.Tensor) -> torch.Tensor:
        if scheme == "fp8":
            step = torch.tensor(float(checkpoint.read(f"{module}.input_scale")[0]))
        else:
            grouped = x.unflatten(-1, (-1, 128)) if scheme == "fp8_block" else x
            step = (grouped.abs().amax(-1, keepdim=True).float() / 448).to(x.dtype)
            x = grouped
        codes = (x / step.to(x.dtype)).clamp(-448, 448).to(torch.float8_e4m3fn)
        return (codes.to(x.dtype) * step.to(x.dtype)).flatten(2)

    for module in checkpoint.compressed:
        layer = plain.get_submodule(module)
        weight = checkpoint.tensor(f"{module}.weight").astype(np.float32)
        layer.weight.data = torch.from_numpy(weight).to(torch.bfloat16)
        layer.register_forward_pre_hook(lambda _, args, name=module: (rounded(name, args[0]),))
    with torch.no_grad():
        found, right = (model(torch.tensor([ids()])).logits[0].float().numpy() for model in (loaded, plain))
    assert np.abs(right).max() > 8
    np.testing.assert_allclose(found, right, atol=0.15)  # of bfloat16; without rounding they are 0.3 apart


HEADS = {"q_", "k_", "v_", "o_"}
IN_TURN = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


def test_steps_of_inputs_hold_what_calibration_saw(tmp_path: Path) -> None:
    """The largest input of each layer, behind what is compressed by then; one layer after the other."""
    model = make(tmp_path / "model", "llama")
    (tmp_path / "text.txt").write_text(text())
    settings: dict[str, Any] = {"calibration": [tmp_path / "text.txt"], "samples": 6, "sequence_length": 24}
    compress(tmp_path / "model", tmp_path / "out", "fp8", **settings)
    checkpoint = open_checkpoint(tmp_path / "out")
    tokens = torch.tensor([int(word[1:]) for word in text().split()[: 6 * 24]]).reshape(6, 24)
    for layer, alike in itertools.product(range(len(model.model.layers)), IN_TURN):
        modules = [f"model.layers.{layer}.{'self_attn' if name[:2] in HEADS else 'mlp'}.{name}" for name in alike]
        seen: list[float] = []
        watched = model.get_submodule(modules[0])
        hook = watched.register_forward_pre_hook(lambda _, args, into=seen: into.append(float(args[0].abs().max())))
        with torch.no_grad():
            model(input_ids=tokens)
        hook.remove()
        for module in modules:
            assert float(checkpoint.read(f"{module}.input_scale")[0]) == pytest.approx(seen[0] / 448, rel=1e-5)
            weight = checkpoint.tensor(f"{module}.weight").astype(np.float32)
            model.get_submodule(module).weight.data = torch.from_numpy(weight)
    described = describe(tmp_path / "out")
    assert (described.format, described.activations) == ("fp8 tensor", "fp8-static")


def test_what_vllm_multiplies_as_one_has_one_step(artifacts: dict[str, Path]) -> None:
    for scheme, part in (("nvfp4a16", "weight_global_scale"), ("fp8", "weight_scale")):
        checkpoint = open_checkpoint(artifacts[scheme])
        original = open_checkpoint(NOVELIST)
        for names in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
            modules = [f"model.layers.2.{name}" for name in names]
            steps = {float(checkpoint.read(f"{module}.{part}")[0]) for module in modules}
            top = max(float(np.abs(original.read(f"{m}.weight").astype(np.float32)).max()) for m in modules)
            assert len(steps) == 1
            assert steps.pop() == pytest.approx(448 * 6 / top if scheme == "nvfp4a16" else top / 448, rel=4e-3)


@pytest.mark.parametrize("scheme", SCHEMES[1:])
def test_files_and_parts_of_weights_do_not_change_the_numbers(scheme: str, tmp_path: Path) -> None:
    one = compress(NOVELIST, tmp_path / "one", scheme, check="none")
    many = compress(NOVELIST, tmp_path / "many", scheme, check="none", shard_bytes=1)
    first, second = open_checkpoint(tmp_path / "one"), open_checkpoint(tmp_path / "many")
    assert first.infos.keys() == second.infos.keys()
    for name in first.infos:
        np.testing.assert_array_equal(first.read(name).view(np.uint8), second.read(name).view(np.uint8))
    assert one.bits_per_weight == pytest.approx(many.bits_per_weight)


@pytest.mark.parametrize("scheme", ["mxfp4a16", "nvfp4a16"])
def test_gptq_on_floats_loses_less_and_is_what_was_solved(scheme: str, tmp_path: Path) -> None:
    data = tmp_path / "held.txt"
    words = (NOVELIST / "evaluation.txt").read_text()
    data.write_text(words[-8000:])
    (tmp_path / "seen.txt").write_text(words[:60000])
    seen: dict[str, Any] = {"calibration": [tmp_path / "seen.txt"], "samples": 16, "sequence_length": 64}
    lost = {}
    for method in ("rtn", "gptq"):
        found = compress(
            NOVELIST, tmp_path / method, scheme, method=method, evaluate=data, **(seen if method == "gptq" else {})
        )
        assert found.evaluation is not None
        lost[method] = found.evaluation["kl"]
    assert lost["gptq"] < 0.8 * lost["rtn"]


def test_floats_can_be_compressed_again_and_exported(artifacts: dict[str, Path], tmp_path: Path) -> None:
    for scheme in ("fp8_dynamic", "nvfp4a16"):
        compress(artifacts[scheme], tmp_path / scheme, bits=8, group_size=-1)
        again, before = open_checkpoint(tmp_path / scheme), open_checkpoint(artifacts[scheme])
        for module in ("model.layers.0.self_attn.q_proj", "model.layers.5.mlp.down_proj"):
            numbers = before.tensor(f"{module}.weight").astype(np.float32)
            off = again.tensor(f"{module}.weight") - numbers
            assert np.abs(off).max() < np.abs(numbers).max() / 200
    export(artifacts["fp8_dynamic"], tmp_path / "out.gguf", format="gguf")
    assert describe(tmp_path / "out.gguf").format.startswith("GGUF BF16")


def test_pruned_weights_are_zeros(tmp_path: Path) -> None:
    found = compress(NOVELIST, tmp_path / "out", format="nvfp4", sparsity=0.5)
    assert found.sparsity >= 0.5
    weight = open_checkpoint(tmp_path / "out").weight("model.layers.0.mlp.up_proj")
    assert isinstance(weight, FloatTensor)
    assert weight.zeros() >= weight.codes.size / 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format": "fp6"}, r"format='fp6': .*fp8"),
        ({"format": "nvfp4", "bits": 8}, "bits=8: format=nvfp4 has 4; leave bits out"),
        ({"format": "mxfp4", "group_size": 64}, "group_size=64: format=mxfp4 has 32"),
        ({"format": "fp8", "group_size": 64}, "fp8 has a step a row"),
        ({"format": "fp8", "symmetric": False}, "symmetric=False: format=fp8 has True"),
        (
            {"format": "mxfp4", "activations": "fp8"},
            "goes with format fp8 or fp8-block, not with mxfp4",
        ),
        ({"bits": 8, "activations": "fp8"}, "not with int"),
        ({"format": "nvfp4", "sparsity": 0.5, "sparse_storage": "bitmask"}, "it holds integers or plain weights"),
        ({"format": "fp8", "recover": True}, "recover: it trains integers; leave it out with format=fp8"),
        ({"format": "fp8-block"}, "fp8-block has blocks of 128 columns, which do not divide .*shape"),
        ({"recipe": "fp8", "ignore": ["*.mlp.*"]}, "activations=fp8-static: lm_head lies outside the blocks"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    make(tmp_path / "model", "llama")
    (tmp_path / "text.txt").write_text(text())
    rows: dict[str, Any] = {"calibration": [tmp_path / "text.txt"], "samples": 2, "sequence_length": 16}
    with pytest.raises(BadRecipe, match=message):
        compress(tmp_path / "model", tmp_path / "out", **settings, **(rows if "recipe" in settings else {}))


def test_damaged_floats_are_refused(tmp_path: Path) -> None:
    tensors = llama_tensors()
    make_model(tmp_path / "model", tensors)
    for scheme in ("fp8_dynamic", "mxfp4a16", "nvfp4a16"):
        compress(tmp_path / "model", tmp_path / scheme, scheme, check="none")
    module, damages = (
        "model.layers.0.self_attn.q_proj",
        {
            "fp8_dynamic": ("weight", 0x7F, "q_proj.weight has a NaN"),
            "mxfp4a16": ("weight_scale", 0xFF, "q_proj.weight_scale has a NaN"),
            "nvfp4a16": ("weight_scale", 0x7F, "q_proj.weight_scale has a NaN"),
        },
    )
    for scheme, (part, code, message) in damages.items():
        checkpoint = open_checkpoint(tmp_path / scheme)
        info = checkpoint.infos[f"{module}.{part}"]
        with open(checkpoint.file_of(info.name), "r+b") as file:
            file.seek(info.start)
            file.write(bytes([code]))
        with pytest.raises(BadCheckpoint, match=message):
            open_checkpoint(tmp_path / scheme).weight(module)
    config = json.loads((tmp_path / "nvfp4a16" / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"] = 32
    (tmp_path / "nvfp4a16" / "config.json").write_text(json.dumps(config))
    with pytest.raises(Unsupported, match="floats of 4 bits, tensor_group 32 in nvfp4-pack-quantized"):
        open_checkpoint(tmp_path / "nvfp4a16")
