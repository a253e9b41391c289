"""What compress writes, read by others: transformers gives the logits of the decoded weights, vLLM the same text."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from penjing import models
from penjing.checkpoint import open_checkpoint
from penjing.compress import compress
from stepping import all_logits, greedy

NOVELIST = Path(__file__).parents[1] / "examples" / "novelist"
PROMPT = "It was a dark night, and the old man"
NEW_TOKENS = 24
BFLOAT16_LEVEL = 0.13  # two steps of a bfloat16 between 8 and 16
VARIANTS: dict[str, dict[str, Any]] = {
    "int4-g32": {"bits": 4, "group_size": 32},
    "int4-g128-asymmetric": {"bits": 4, "group_size": 128, "symmetric": False},
    "int8": {"recipe": "int8"},
    "w8a8": {"recipe": "w8a8"},
    "int4-sparse50": {"recipe": "int4-sparse50", "group_size": 64},
    "sparse50": {"recipe": "sparse50"},
}


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("artifacts")
    for name, settings in VARIANTS.items():
        compress(NOVELIST, folder / name, check="none", **settings)
    return {name: folder / name for name in VARIANTS}


def ids() -> list[int]:
    tokenizers = pytest.importorskip("tokenizers")
    tokens: list[int] = tokenizers.Tokenizer.from_file(str(NOVELIST / "tokenizer.json")).encode(PROMPT).ids
    return tokens


def our_logits(folder: Path, tokens: list[int]) -> np.ndarray:
    return all_logits(models.load(folder, activations="float"), tokens)


def our_text(folder: Path) -> list[int]:
    """Greedy tokens after the prompt, from the serving path's own model."""
    return greedy(models.load(folder), ids(), NEW_TOKENS)


# torch 2.13 and transformers warn about each other's names while they load a compressed model.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("variant", VARIANTS)
def test_transformers_gives_the_logits_of_the_decoded_weights(variant: str, artifacts: dict[str, Path]) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    tokens, folder = ids(), artifacts[variant]
    # transformers 5.24 with compressed-tensors 0.20 cannot keep packed zero points compressed, not even those that
    # compressed-tensors itself has packed; it can decode them while it loads.
    how = {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)} if "asym" in variant else {}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **how)
    loaded.eval()
    plain = transformers.AutoModelForCausalLM.from_pretrained(NOVELIST, dtype=torch.float32)
    checkpoint = open_checkpoint(folder)
    weights = {name: torch.from_numpy(checkpoint.tensor(name).astype(np.float32)) for name in checkpoint.names}
    plain.load_state_dict(weights, strict=False)
    with torch.no_grad():
        theirs = loaded(torch.tensor([tokens])).logits[0].numpy()
        decoded = plain(torch.tensor([tokens])).logits[0].numpy()
    # W8A8 rounds activations: ties go either way, and the plain model does not round them at all. Zero points are
    # decoded by transformers in bfloat16.
    tolerance = {"w8a8": 0.5, "int4-g128-asymmetric": 0.05}.get(variant, 2e-3)
    np.testing.assert_allclose(theirs, decoded, atol=tolerance)
    np.testing.assert_allclose(our_logits(folder, tokens), theirs, atol=tolerance)


VLLM = """
import json, os, sys
os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR",
               "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
def main():
    from vllm import LLM, SamplingParams
    llm = LLM(sys.argv[1], enforce_eager=True, max_model_len=256)
    prompt = {"prompt_token_ids": json.loads(sys.argv[2])}
    settings = SamplingParams(temperature=0, max_tokens=int(sys.argv[3]), ignore_eos=True)
    print("TOKENS", json.dumps(list(llm.generate([prompt], settings)[0].outputs[0].token_ids)))
if __name__ == "__main__":
    main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "int8"])
def test_vllm_writes_the_same_text(variant: str, artifacts: dict[str, Path], tmp_path: Path) -> None:
    """Not int8: vLLM's CPU backend has no kernel for 8-bit weights without 8-bit activations (its GPU one has)."""
    python = os.environ.get("PENJING_VLLM_PYTHON")
    if not python:
        pytest.skip("PENJING_VLLM_PYTHON does not name a Python that has vllm")
    (tmp_path / "run.py").write_text(VLLM)
    arguments = [str(artifacts[variant]), json.dumps(ids()), str(NEW_TOKENS)]
    child = subprocess.run([python, str(tmp_path / "run.py"), *arguments], capture_output=True, text=True)
    answers = [line for line in child.stdout.splitlines() if line.startswith("TOKENS ")]
    assert answers, child.stderr[-2000:]
    theirs, ours = json.loads(answers[0].removeprefix("TOKENS ")), our_text(artifacts[variant])
    if theirs != ours:  # vLLM computes in bfloat16: only where two tokens are level to that may it take the other
        at = next(i for i in range(NEW_TOKENS) if theirs[i] != ours[i])
        logits = our_logits(artifacts[variant], ids() + ours[:at])[-1]
        assert logits[ours[at]] - logits[theirs[at]] < BFLOAT16_LEVEL


@pytest.mark.parametrize("recipe", ["int4-sparse50", "sparse50", "w8a8-sparse50"])
def test_export_of_a_bitmask_is_the_dense_artifact(recipe: str, tmp_path: Path) -> None:
    compress(NOVELIST, tmp_path / "dense", recipe, check="none")
    compress(NOVELIST, tmp_path / "sparse", recipe, sparse_storage="bitmask", check="none")
    flags = [str(tmp_path / "sparse"), "-o", str(tmp_path / "out"), "--format", "compressed-tensors", "--json"]
    child = subprocess.run([sys.executable, "-m", "penjing", "export", *flags], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    answer = json.loads(child.stdout)
    assert "% of the compressed weights are zeros, written as zeros" in answer["notes"][0]
    assert answer["size_bytes"] == (tmp_path / "out" / "model.safetensors").stat().st_size
    dense, out = open_checkpoint(tmp_path / "dense"), open_checkpoint(tmp_path / "out")
    assert dense.config == out.config
    assert dense.infos.keys() == out.infos.keys()
    for name in dense.infos:
        # −0 is stored as 0 by a bitmask; everything else is bit for bit the same.
        np.testing.assert_array_equal(out.read(name).astype(np.float64), dense.read(name).astype(np.float64))
    again = subprocess.run([sys.executable, "-m", "penjing", "export", *flags], capture_output=True, text=True)
    assert again.returncode == 2
    assert "not empty" in again.stderr
    other = subprocess.run(
        [
            sys.executable,
            "-m",
            "penjing",
            "export",
            str(tmp_path / "sparse"),
            "-o",
            str(tmp_path / "x"),
            "--format",
            "tflite",
        ],
        capture_output=True,
        text=True,
    )
    assert other.returncode == 2
    assert "'tflite'" in other.stderr
