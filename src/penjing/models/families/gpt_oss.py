"""gpt-oss: attention with sinks, a window in every other block, and clamped experts in MXFP4.  arXiv 2508.10925.

Experts lie in tensors of all of them, gate and up row by row in turn: as (experts, in, out) in floats, or as MXFP4
blocks of (experts, out, in).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import Experts, Linear, ModelConfig, Run, Source, Weights
from ..parts import module
from ..reader import Reader, windows
from .llama import like_llama


def read(values: Mapping[str, Any], where: str) -> ModelConfig:
    """``config.json`` as a `ModelConfig`; errors name the key, and the file by ``where``."""
    read = Reader(values, where, {"head_dim": 64, "num_key_value_heads": 8, "sliding_window": 128})
    read.refuse("hidden_act", "silu")
    rule = Experts(
        count=read.experts("num_local_experts", "num_experts"),
        top_k=read.integer("num_experts_per_tok", read.values.get("experts_per_token", 4)),
        inner=read.integer("intermediate_size"),
        activation="clamped",
        scoring="chosen",
        limit=read.number("swiglu_limit", 7.0),
        alpha=read.number("swiglu_alpha", 1.702),
    )
    weights = _experts(read.integer("hidden_size"), rule)
    bias = read.flag("attention_bias", True)
    return like_llama(
        read,
        windows=windows(read.kinds(read.every(2)), read.maybe("sliding_window")),
        qkv_bias=bias,
        output_bias=bias,
        feed=lambda index: (rule, weights),
        attention={"sinks": True},
    )


def _experts(hidden: int, rule: Experts) -> Weights:
    inner, both = rule.inner, "mlp.experts.gate_up_proj"
    linears = [Linear("router", "mlp_input", "scores", (rule.count, hidden), True, module("mlp.router"))]
    for number in range(rule.count):
        role, made = f"experts.{number}.", f"experts.{number}.mlp_inner"
        gate, up = ((Source(both, (Run(place, 1, 2, inner),), 2 * inner, number, transposed=True),) for place in (0, 1))
        down = (Source("mlp.experts.down_proj", None, 0, number, transposed=True),)
        linears += [
            Linear(f"{role}gate", "mlp_input", made, (inner, hidden), True, gate),
            Linear(f"{role}up", "mlp_input", made, (inner, hidden), True, up),
            Linear(f"{role}down", made, "stream", (hidden, inner), True, down),
        ]
    return Weights(tuple(linears))
