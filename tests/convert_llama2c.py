"""A llama2.c model and its tokenizer as a Hugging Face folder.

    python tests/convert_llama2c.py MODEL.bin TOKENIZER.bin FOLDER

llama2.c turns neighbouring elements of a head (2i with 2i + 1) by the rotary angles, Hugging Face the halves (i with
i + d/2): rows of the queries' and keys' weights change places.
"""

from __future__ import annotations

import json
import struct
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, processors

UNKNOWN, BOS, EOS = 0, 1, 2


@dataclass(frozen=True)
class Story:
    """The file as it is: header and float32 tensors, by the names of run.c."""

    dim: int
    hidden_dim: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    positions: int
    tensors: dict[str, np.ndarray]


def read_model(file: Path) -> Story:
    raw = file.read_bytes()
    dim, hidden_dim, layers, heads, kv_heads, vocabulary, positions = struct.unpack("<7i", raw[:28])
    kv_dim = dim * kv_heads // heads
    shapes = {
        "token_embedding_table": (vocabulary, dim),
        "rms_att_weight": (layers, dim),
        "wq": (layers, dim, dim),
        "wk": (layers, kv_dim, dim),
        "wv": (layers, kv_dim, dim),
        "wo": (layers, dim, dim),
        "rms_ffn_weight": (layers, dim),
        "w1": (layers, hidden_dim, dim),
        "w2": (layers, dim, hidden_dim),
        "w3": (layers, hidden_dim, dim),
        "rms_final_weight": (dim,),
    }
    data, start, tensors = np.frombuffer(raw, "<f4", offset=28), 0, {}
    for name, shape in shapes.items():
        size = int(np.prod(shape))
        tensors[name] = data[start : start + size].reshape(shape)
        start += size
    if vocabulary < 0 or len(data) != start + positions * dim // heads:
        raise ValueError(f"{file}: {len(data)} numbers, expected {start + positions * dim // heads}, tied embeddings")
    return Story(dim, hidden_dim, layers, heads, kv_heads, vocabulary, positions, tensors)


def read_tokenizer(file: Path) -> list[tuple[str, float]]:
    """(piece, score) of each token; spaces are plain in pieces."""
    raw, start, pieces = file.read_bytes(), 4, []
    while start < len(raw):
        score, length = struct.unpack_from("<fi", raw, start)
        start += 8 + length
        pieces.append((raw[start - length : start].decode(), score))
    return pieces


def halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head: the even ones first, then the odd ones."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def tensors_of(story: Story) -> dict[str, np.ndarray]:
    old = story.tensors
    new = {"model.embed_tokens.weight": old["token_embedding_table"], "model.norm.weight": old["rms_final_weight"]}
    names = {"wv": "self_attn.v_proj", "wo": "self_attn.o_proj"}
    names |= {"w1": "mlp.gate_proj", "w2": "mlp.down_proj", "w3": "mlp.up_proj"}
    names |= {"rms_att_weight": "input_layernorm", "rms_ffn_weight": "post_attention_layernorm"}
    for layer in range(story.layers):
        prefix = f"model.layers.{layer}."
        new |= {f"{prefix}{name}.weight": old[key][layer] for key, name in names.items()}
        new[f"{prefix}self_attn.q_proj.weight"] = halves(old["wq"][layer], story.heads)
        new[f"{prefix}self_attn.k_proj.weight"] = halves(old["wk"][layer], story.kv_heads)
    return {name: np.ascontiguousarray(tensor) for name, tensor in new.items()}


def config_of(story: Story) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "bos_token_id": BOS,
        # A story ends where the next one would begin.
        "eos_token_id": [BOS, EOS],
        "hidden_act": "silu",
        "hidden_size": story.dim,
        "intermediate_size": story.hidden_dim,
        "max_position_embeddings": story.positions,
        "num_attention_heads": story.heads,
        "num_hidden_layers": story.layers,
        "num_key_value_heads": story.kv_heads,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "vocab_size": story.vocabulary,
    }


def tokenizer_of(pieces: list[tuple[str, float]]) -> Tokenizer:
    """Byte-pair encoding with the scores as ranks, as sentencepiece's models are converted."""
    names = [piece.replace(" ", "▁") for piece, _ in pieces]
    names[UNKNOWN : EOS + 1] = ["<unk>", "<s>", "</s>"]
    ids = {name: token for token, name in enumerate(names)}
    merges = []
    for token in sorted(range(259, len(names)), key=lambda token: -pieces[token][1]):
        name = names[token]
        merges += [(name[:at], name[at:]) for at in range(1, len(name)) if name[:at] in ids and name[at:] in ids]
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def convert(model: Path, tokenizer: Path, folder: Path) -> Path:
    story = read_model(model)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors_of(story), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config_of(story), indent=2))
    tokenizer_of(read_tokenizer(tokenizer)).save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "model_max_length": story.positions}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **named}))
    return folder


if __name__ == "__main__":
    convert(*map(Path, sys.argv[1:4]))
