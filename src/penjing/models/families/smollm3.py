"""SmolLM 3: Llama in which every fourth block has no positions (NoPE; Yang et al., arXiv 2501.18795)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import ModelConfig
from ..reader import FULL, SLIDING, Reader, windows
from ..rope import read_rope
from .llama import like_llama


def read(values: Mapping[str, Any], where: str) -> ModelConfig:
    """``config.json`` as a `ModelConfig`; errors name the key, and the file by ``where``."""
    read = Reader(values, where, {"num_key_value_heads": 4})
    bias = read.flag("attention_bias")
    rope = read_rope(read.values, where, read.heads()[2], rope_theta=2_000_000.0)
    turning = values.get("no_rope_layers")
    if turning is None:
        step = read.integer("no_rope_layer_interval", 4)
        turning = [(index + 1) % step != 0 for index in range(read.layers)]
    if not isinstance(turning, list) or len(turning) < read.layers:
        raise read.error("no_rope_layers", f"{read.layers} times 1 (positions) or 0 (none)")
    turning = turning[: read.layers]
    window = read.maybe("sliding_window") if read.flag("use_sliding_window") else None
    kinds = read.kinds([FULL if turns or window is None else SLIDING for turns in turning])
    return like_llama(
        read,
        windows=windows(kinds, window),
        ropes=[rope if turns else None for turns in turning],
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=read.flag("mlp_bias"),
        tied=True,
    )
