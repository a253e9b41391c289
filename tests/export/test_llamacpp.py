"""The real llama.cpp on exported files: logits, token ids, greedy text.

PENJING_LLAMACPP names a Python that has llama-cpp-python; `make llamacpp` runs these.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from penjing.export import export
from penjing.models import Chunk, load
from penjing.models.tokenizer import Tokenizer

PYTHON = os.environ.get("PENJING_LLAMACPP")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="PENJING_LLAMACPP does not name a Python with llama-cpp-python"),
]
HERE = Path(__file__).parent
NOVELIST = HERE.parents[1] / "examples" / "novelist"
TEXTS = [
    "Once upon a time, it's 1234 o'clock.\n\n  Né à Zürich — 你好!",
    "def f(x):\n\treturn x+1  ",
    "12345 6 7.89 ³²¹ \r\n\r\n  HelloWorld a\u00a0b",
    "!!??//\n/x ...---\x01",
]
# llama.cpp rounds what a layer takes to 8 bits; of plain weights, keys and values to float16.
LIMITS = {"f16": 0.01, "bf16": 0.01, "q8_0": 0.03, "q4_0": 0.03, "q4_1": 0.03, "q4_k": 0.04, "q6_k": 0.03}


def theirs(file: Path, ids: list[int], texts: list[str], folder: Path) -> Any:
    asked, out = folder / "asked.json", folder / "out.npz"
    asked.write_text(json.dumps({"ids": ids, "texts": texts}))
    subprocess.run([str(PYTHON), str(HERE / "llamacpp_logits.py"), str(file), str(asked), str(out)], check=True)
    return np.load(out)


def ours(file: Path, ids: list[int]) -> Any:
    model = load(file, activations="float")
    model.reserve(8, "float32", 1)
    return model.logits([Chunk(np.array(ids, np.int32), 0, np.arange(8, dtype=np.int32), 0)])[0]


def relative(found: Any, right: Any) -> float:
    return float(np.sqrt(np.square(found - right).mean() / np.square(right).mean()))


@pytest.mark.parametrize("kind", LIMITS)
def test_novelist_is_computed_alike(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "n.gguf"
    export(NOVELIST, file, "gguf", kind)
    tokenizer = Tokenizer(file)
    ids = tokenizer.encode((NOVELIST / "evaluation.txt").read_text()[:600])[:100]
    found, right = ours(file, ids), theirs(file, ids, TEXTS, tmp_path)
    assert relative(found, right["logits"]) < LIMITS[kind]
    assert (found.argmax(1) == right["logits"].argmax(1)).mean() >= 0.95
    for number, text in enumerate(TEXTS):
        assert list(right[f"text{number}"]) == tokenizer.encode(text) == Tokenizer(NOVELIST).encode(text)


sys.path.insert(0, str(HERE.parent / "models"))
from variants import SHAPE, VARIANTS  # noqa: E402  (beside tests of other folders)

# The tokens that a window, where there is one, holds: the context of the file ends with it.
FAMILIES = {
    **dict.fromkeys(("llama", "llama-mqa", "llama-tied", "llama-biases", "llama-linear", "llama3"), 20),
    **dict.fromkeys(("mistral-no-window", "qwen2", "qwen3", "gemma", "phi3-long", "phi4", "granite", "olmo2"), 20),
    **dict.fromkeys(("mistral-window", "qwen2-window", "phi3"), 4),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_families_are_computed_as_transformers_does(name: str, tmp_path: Path) -> None:
    import torch
    import transformers

    family, changes = VARIANTS[name]
    torch.manual_seed(0)
    shape = {**SHAPE, "hidden_size": 32, "intermediate_size": 64, **changes}
    config = transformers.AutoConfig.for_model(family, **shape)
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for each in model.parameters():
            each.add_(torch.randn_like(each) * 0.1)
    model.save_pretrained(tmp_path / "m")
    ids = list(range(3, 3 + FAMILIES[name]))
    right = model(torch.tensor([ids])).logits[0].detach().numpy()
    export(tmp_path / "m", tmp_path / "m.gguf", "gguf", "f32")
    assert relative(theirs(tmp_path / "m.gguf", ids, [], tmp_path)["logits"], right) < 5e-3
    assert relative(ours(tmp_path / "m.gguf", ids), right) < 1e-5


def test_greedy_text_is_the_same(tmp_path: Path) -> None:
    file = tmp_path / "n.gguf"
    export(NOVELIST, file, "gguf", "f16")
    ids = Tokenizer(file).encode("It was a dark night")
    mine, other = list(ids), list(ids)
    for _ in range(12):
        mine.append(int(ours(file, mine)[-1].argmax()))
        other.append(int(theirs(file, other, [], tmp_path)["logits"][-1].argmax()))
    assert mine == other
