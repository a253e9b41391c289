"""StarCoder 2: layer norms, biases everywhere, and an MLP without a gate.  Lozhkov et al., arXiv 2402.19173."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import Mlp, ModelConfig
from ..parts import layer_norm, mlp, module
from ..reader import Reader
from .llama import like_llama


def read(values: Mapping[str, Any], where: str) -> ModelConfig:
    """``config.json`` as a `ModelConfig`; errors name the key, and the file by ``where``."""
    read = Reader(values, where, {"num_key_value_heads": 2})
    bias, inner = read.flag("use_bias", True), read.integer("intermediate_size")
    rule = Mlp(inner, read.activation("hidden_act", "gelu_pytorch_tanh"), gated=False)
    sources = {"up": module("mlp.c_fc"), "down": module("mlp.c_proj")}
    weights = mlp(read.integer("hidden_size"), inner, gated=False, bias=bias, sources=sources)
    return like_llama(
        read,
        windows=[read.maybe("sliding_window")] * read.layers,
        norm=layer_norm(read.number("norm_epsilon", 1e-5)),
        qkv_bias=bias,
        output_bias=bias,
        feed=lambda index: (rule, weights),
        tied=True,
    )
