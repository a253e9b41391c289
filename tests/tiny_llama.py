"""A small Llama with seeded weights, in two shards, and the command that compresses it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from penjing.checkpoint import write_safetensors

NOVELIST = Path(__file__).parents[1] / "examples" / "novelist"
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def llama_tensors(dtype: Any = ml_dtypes.bfloat16) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (50, 64), "lm_head": (50, 64), "model.norm": (64,)}
    for layer in range(3):
        block = {"self_attn.q_proj": (64, 64), "self_attn.k_proj": (32, 64), "self_attn.v_proj": (32, 64)}
        block |= {"self_attn.o_proj": (64, 64), "mlp.gate_proj": (96, 64), "mlp.up_proj": (96, 64)}
        block |= {"mlp.down_proj": (64, 96)}
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
        shapes |= {f"model.layers.{layer}.{name}_layernorm": (64,) for name in ("input", "post_attention")}
    return {
        f"{name}.weight": (random.standard_normal(shape) * 0.2 + (len(shape) == 1)).astype(dtype)
        for name, shape in shapes.items()
    }


def make_model(folder: Path, tensors: dict[str, np.ndarray] | None = None, **config: Any) -> Path:
    """A small Llama with seeded weights, in two shards."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = llama_tensors() if tensors is None else tensors
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, its in shards.items():
        write_safetensors(folder / file, {name: tensors[name] for name in its})
    places = {name: file for file, its in shards.items() for name in its}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    words = {"type": "WordLevel", "vocab": {"w0": 0}, "unk_token": "w0"}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": words, "added_tokens": []}))
    return folder


def command(model: Path, out: Path, *more: str) -> list[str]:
    flags = ["--bits", "4", "--group-size", "32", "--prune-method", "l1", "--sparsity", "0.5", "--shard-size", "1"]
    return [sys.executable, "-m", "penjing", "compress", str(model), "-o", str(out), *flags, *more]
