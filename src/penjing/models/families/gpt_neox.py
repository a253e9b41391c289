"""GPT-NeoX and Pythia: attention and MLP side by side, queries, keys and values fused head by head.

Black et al., arXiv 2204.06745.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import Attention, Mlp, ModelConfig, Run
from ..parts import block, decoder, grouped_attention, layer_norm, mlp, module, part, pre_norm
from ..reader import Reader
from ..rope import read_rope


def read(values: Mapping[str, Any], where: str) -> ModelConfig:
    """``config.json`` as a `ModelConfig`; errors name the key, and the file by ``where``."""
    read = Reader(_renamed(values), where)
    hidden, inner = read.integer("hidden_size"), read.integer("intermediate_size")
    heads, _, head_dim = read.heads()
    fused, bias = "attention.query_key_value", read.flag("attention_bias", True)
    sources = {
        role: part(fused, 3 * hidden, Run(place * head_dim, head_dim, 3 * head_dim, heads))
        for place, role in enumerate("qkv")
    }
    norm = layer_norm(read.number("layer_norm_eps", 1e-5))
    rope = read_rope(read.values, where, head_dim, partial_rotary_factor=0.25)
    mixer = Attention(heads, heads, head_dim, head_dim, head_dim**-0.5, rope=rope)
    sources |= {"o": module("attention.dense"), "up": module("mlp.dense_h_to_4h"), "down": module("mlp.dense_4h_to_h")}
    weights = (
        grouped_attention(hidden, mixer, norm, qkv_bias=bias, output_bias=bias, sources=sources),
        mlp(hidden, inner, gated=False, bias=True, sources=sources),
        pre_norm(hidden, norm),
    )
    rule = Mlp(inner, read.activation("hidden_act", "gelu"), gated=False)
    alike = block(mixer, rule, *weights, parallel=read.flag("use_parallel_residual", True))
    return decoder(
        read,
        [alike] * read.layers,
        norm("final_layer_norm", hidden),
        stem="gpt_neox.",
        embedding_name="embed_in",
        head_name="embed_out",
    )


def _renamed(values: Mapping[str, Any]) -> dict[str, Any]:
    """This family's names of rotary settings, as others call them; every head is a key-value head."""
    names = {"rotary_pct": "partial_rotary_factor", "rotary_emb_base": "rope_theta"}
    return {
        names.get(key, key): value for key, value in values.items() if key not in ("head_dim", "num_key_value_heads")
    }
