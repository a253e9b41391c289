"""What llama.cpp calls the tensors of an architecture, and what Hugging Face calls them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

# Role of a weight (`models.config.Linear`) → its tensor in a block.
ROLES = {
    **{"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output"},
    **{"gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down"},
}
# Place of a norm (`models.config.Block`) → its tensor in a block.
NORMS = {
    **{"attention_in": "attn_norm", "attention_out": "post_attention_norm"},
    **{"mlp_in": "ffn_norm", "mlp_out": "post_ffw_norm"},
    **{"query": "attn_q_norm", "key": "attn_k_norm"},
}
EMBEDDING, HEAD, FINAL_NORM, ROPE = "token_embd", "output", "output_norm", "rope_freqs.weight"
ROPE_SHORT, ROPE_LONG = "rope_factors_short.weight", "rope_factors_long.weight"
_OUTSIDE = {EMBEDDING: "model.embed_tokens", HEAD: "lm_head", FINAL_NORM: "model.norm"}
_BLOCK = re.compile(r"blk\.(?P<index>\d+)\.(?P<part>\w+)\.(?P<kind>weight|bias)")
# A tensor of a block → the module.
_MODULES = {
    **{"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"},
    **{"attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"},
    **{"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"},
    **{"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"},
}
_SANDWICH = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


@dataclass(frozen=True)
class Architecture:
    """An architecture of llama.cpp.

    families: that are written as it; it is read as the first.  neighbours: rotary
    pairs are neighbours in a head, so that rows of queries and keys lie in another order than Hugging Face's.
    norm_offset: what stored norms have more than Hugging Face's.  modules: what a block's tensors are called, besides
    the usual names.  fused: tensors of several weights one after another.  tied: a file without "output" is read.
    """

    name: str
    families: tuple[str, ...]
    neighbours: bool = False
    norm_offset: float = 0.0
    modules: Mapping[str, str] = field(default_factory=dict)
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    tied: bool = True

    def stored(self, name: str) -> str | None:
        """Hugging Face's name of a tensor; None for one that has none."""
        module, _, kind = name.rpartition(".")
        if module in _OUTSIDE:
            return f"{_OUTSIDE[module]}.{kind}"
        found = _BLOCK.fullmatch(name)
        if found is None:
            return None
        own = {**_MODULES, **self.modules}
        where = own.get(found["part"])
        return where and f"model.layers.{found['index']}.{where}.{found['kind']}"


ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        Architecture("llama", ("llama", "mistral"), neighbours=True),
        Architecture("qwen2", ("qwen2",)),
        Architecture("qwen3", ("qwen3",)),
        Architecture("gemma", ("gemma",), norm_offset=1.0),
        Architecture(
            "phi3",
            ("phi3",),
            modules={"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
            fused={"attn_qkv": ("q", "k", "v"), "ffn_up": ("gate", "up")},
        ),
        Architecture("granite", ("granite",), neighbours=True),
        Architecture("olmo2", ("olmo2",), modules=_SANDWICH, tied=False),
    )
}
BY_FAMILY = {family: each for each in ARCHITECTURES.values() for family in each.families}
