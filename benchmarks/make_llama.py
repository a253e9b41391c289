"""A checkpoint in Llama's shape with seeded random weights, written a piece at a time.

    python benchmarks/make_llama.py FOLDER [--size 1.1b|13b|tiny] [--layers N] [--tokenizer examples/novelist]

Random weights say nothing of quality, but memory, speed and file sizes are those of a real model of that size.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np

from penjing.checkpoint.safetensors import Chunks, write_safetensors

# hidden, layers, MLP, heads, key-value heads, vocabulary
SIZES = {
    "tiny": (64, 3, 160, 4, 2, 256),
    "1.1b": (2048, 22, 5632, 32, 4, 32000),
    "13b": (5120, 40, 13824, 40, 40, 32000),
}
PIECE = 1 << 22


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=SIZES, default="1.1b")
    parser.add_argument("--layers", type=int, help="fewer or more than a model of that size has")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer", type=Path, help="folder whose tokenizer files are copied")
    arguments = parser.parse_args()
    make(arguments.folder, arguments.size, arguments.seed, arguments.layers, arguments.tokenizer)


def make(folder: Path, size: str, seed: int = 0, depth: int | None = None, tokenizer: Path | None = None) -> None:
    """Write the checkpoint: one shard for the embeddings and one for every four blocks.

    depth: layers, if not as many as the size has.  tokenizer: a folder whose tokenizer's files are copied.
    """
    hidden, layers, mlp, heads, kv_heads, vocabulary = SIZES[size]
    layers = depth or layers
    folder.mkdir(parents=True, exist_ok=True)
    head = hidden // heads
    block = {
        "self_attn.q_proj": (heads * head, hidden),
        "self_attn.k_proj": (kv_heads * head, hidden),
        "self_attn.v_proj": (kv_heads * head, hidden),
        "self_attn.o_proj": (hidden, heads * head),
        "mlp.gate_proj": (mlp, hidden),
        "mlp.up_proj": (mlp, hidden),
        "mlp.down_proj": (hidden, mlp),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    outside = {"model.embed_tokens": (vocabulary, hidden), "model.norm": (hidden,), "lm_head": (vocabulary, hidden)}
    shards = [outside] + [
        {
            f"model.layers.{layer}.{name}": shape
            for layer in range(low, min(low + 4, layers))
            for name, shape in block.items()
        }
        for low in range(0, layers, 4)
    ]
    places, total = {}, 0
    for number, shapes in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {f"{name}.weight": random_tensor(f"{seed}.{name}", shape) for name, shape in shapes.items()}
        total += write_safetensors(folder / file, tensors, {"format": "pt"})[1]
        places |= dict.fromkeys(tensors, file)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    for file in tokenizer.glob("tokenizer*.json") if tokenizer else ():
        shutil.copy(file, folder)


def random_tensor(name: str, shape: tuple[int, ...]) -> Chunks:
    """Norms of ones, matrices of N(0, 0.02²) that depend on the name alone."""

    def parts() -> Iterator[np.ndarray]:
        size = int(np.prod(shape))
        if len(shape) == 1:
            yield np.ones(size, ml_dtypes.bfloat16)
            return
        generator = np.random.Generator(np.random.SFC64(list(name.encode())))
        for low in range(0, size, PIECE):
            values = generator.standard_normal(min(PIECE, size - low), np.float32) * np.float32(0.02)
            yield values.astype(ml_dtypes.bfloat16)

    return Chunks(np.dtype(ml_dtypes.bfloat16), shape, parts())


if __name__ == "__main__":
    main()
