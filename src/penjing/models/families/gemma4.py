"""Gemma 4, its text: heads of two sizes, shared keys and values, a second embedding, experts beside the MLP."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..config import (
    Attention,
    Block,
    Experts,
    Linear,
    Mlp,
    ModelConfig,
    Norm,
    PerLayerEmbedding,
    Vector,
    Weights,
)
from ..parts import block, decoder, fused_expert, grouped_attention, mlp, module, rms, sandwich
from ..reader import FULL, SLIDING, Reader, windows
from ..rope import Rope, read_rope_of

DEFAULTS = {
    "head_dim": 256,
    "global_head_dim": 512,
    "num_key_value_heads": 4,
    "sliding_window": 512,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131_072,
    "vocab_size_per_layer_input": 262_144,
    "hidden_size_per_layer_input": 256,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
# What the two kinds of blocks turn by, where config.json does not say.
_ROPES = {
    SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
}


def read(values: Mapping[str, Any], where: str) -> ModelConfig:
    """``config.json`` as a `ModelConfig`; errors name the key, and the file by ``where``."""
    read = Reader(values, where, DEFAULTS)
    read.refuse("use_bidirectional_attention", "vision", False)
    hidden, norm = read.integer("hidden_size"), rms(read.number("rms_norm_eps", 1e-6))
    inner = read.count("hidden_size_per_layer_input")
    extra = None
    if inner:
        extra = PerLayerEmbedding(
            inner=inner,
            vocab_size=read.integer("vocab_size_per_layer_input"),
            table="embed_tokens_per_layer",
            projection="per_layer_model_projection",
            norm=norm("per_layer_projection_norm", inner),
            scale=inner**0.5,
        )
    return decoder(
        read,
        _blocks(read, inner),
        norm("norm", hidden),
        tied=True,
        embedding_scale=hidden**0.5,
        logit_softcap=read.factor("final_logit_softcapping"),
        per_layer=extra,
    )


def _blocks(read: Reader, per_layer_inner: int) -> list[Block]:
    layers = read.layers
    kinds = [*read.kinds(read.every(6))[:-1], FULL]  # the last one always sees everything
    own = layers - read.count("num_kv_shared_layers", 0)
    if own < 1 or set(kinds[:own]) != set(kinds):
        raise read.error("num_kv_shared_layers", "blocks of every kind before those that share")
    lasts = {kind: own - 1 - kinds[:own][::-1].index(kind) for kind in set(kinds)}
    made = []
    for index, (kind, window) in enumerate(zip(kinds, windows(kinds, read.integer("sliding_window")), strict=True)):
        shares = None if index < own else lasts[kind]
        attention, weights = _attention(read, index, kind, window, shares)
        wide = 2 if shares is not None and read.flag("use_double_wide_mlp") else 1
        rule, after = _feed(read, wide * read.integer("intermediate_size"))
        rest = _around(read, per_layer_inner)
        made.append(block(attention, rule, weights, after, rest, per_layer_inner=per_layer_inner))
    return made


def _attention(
    read: Reader, index: int, kind: str, window: int | None, shares: int | None
) -> tuple[Attention, Weights]:
    heads, kv_heads, head_dim = _sizes(read, index, kind)
    norm, bias = rms(read.number("rms_norm_eps", 1e-6)), read.flag("attention_bias")
    attention = Attention(
        heads,
        kv_heads,
        head_dim,
        head_dim,
        scale=1.0,
        window=window,
        rope=_rope(read, kind, head_dim),
        query_key_norm="head",
        values_are_keys=read.flag("attention_k_eq_v") and kind == FULL,
        shares_kv_of=shares,
    )
    weights = grouped_attention(read.integer("hidden_size"), attention, norm, qkv_bias=bias, output_bias=bias)
    if shares is None:
        weights += Weights(norms={"value": replace(norm("", head_dim), weight=None)})
    return attention, weights


def _sizes(read: Reader, index: int, kind: str) -> tuple[int, int, int]:
    """Heads, key-value heads and the size of a head, which those of full attention have their own of."""
    own = read.values.get("per_layer_config")
    if own is not None:
        changes = own.get(str(index), {}) if isinstance(own, dict) else None
        if not isinstance(changes, dict):
            raise read.error("per_layer_config", "an object of numbers of blocks and what differs in them")
    elif kind == FULL:
        changes = {"head_dim": read.integer("global_head_dim")}
        if read.flag("attention_k_eq_v") and read.values.get("num_global_key_value_heads") is not None:
            changes["num_key_value_heads"] = read.integer("num_global_key_value_heads")
    else:
        changes = {}
    return Reader({**read.values, **changes}, read.where).heads()


def _rope(read: Reader, kind: str, head_dim: int) -> Rope:
    given = read.values.get("rope_parameters") or _ROPES
    return read_rope_of(kind, {**read.values, "rope_parameters": given}, read.where, head_dim)


def _feed(read: Reader, inner: int) -> tuple[Mlp | Experts, Weights]:
    hidden, activation = read.integer("hidden_size"), read.activation("hidden_activation")
    if not read.flag("enable_moe_block"):
        return Mlp(inner, activation), mlp(hidden, inner)
    rule = Experts(
        count=read.experts("num_experts"),
        top_k=read.integer("top_k_experts"),
        inner=read.integer("moe_intermediate_size"),
        activation=activation,
        shared_inner=inner,
    )
    norm, eps = rms(read.number("rms_norm_eps", 1e-6)), read.number("rms_norm_eps", 1e-6)
    norms = {
        "router": Norm("router.scale", hidden, eps, scale=hidden**-0.5),
        "experts_in": norm("pre_feedforward_layernorm_2", hidden),
        "shared_out": norm("post_feedforward_layernorm_1", hidden),
        "experts_out": norm("post_feedforward_layernorm_2", hidden),
    }
    vectors = {"expert_scale": Vector("router.per_expert_scale", (rule.count,))}
    router = Linear("router", "router_input", "scores", (rule.count, hidden), False, module("router.proj"))
    made = Weights((router,), norms, vectors) + mlp(hidden, inner, role="shared.")
    experts: list[Linear] = []
    for number in range(rule.count):
        sources = fused_expert("experts", rule.inner, number)
        role = f"experts.{number}."
        experts += mlp(hidden, rule.inner, role=role, reads="experts_input", sources=sources).linears
    return rule, made + Weights(tuple(experts))


def _around(read: Reader, inner: int) -> Weights:
    """The norms and factors of a block, and the way in of the second embedding."""
    hidden, norm = read.integer("hidden_size"), rms(read.number("rms_norm_eps", 1e-6))
    made = sandwich(hidden, norm) + Weights(vectors={"layer_scale": Vector("layer_scalar", (1,))})
    if not inner:
        return made
    down, up = module("per_layer_input_gate"), module("per_layer_projection")
    return made + Weights(
        (
            Linear("per_layer.down", "block_output", "per_layer_inner", (inner, hidden), False, down),
            Linear("per_layer.up", "per_layer_inner", "stream", (hidden, inner), False, up),
        ),
        {"per_layer": norm("post_per_layer_input_norm", hidden)},
    )
