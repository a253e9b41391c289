"""OLMo 2: norms after each part and none before, queries and keys normed over all heads.  arXiv 2501.00656."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import ModelConfig
from ..parts import norms_at, rms
from ..reader import Reader
from .llama import like_llama


def read(values: Mapping[str, Any], where: str) -> ModelConfig:
    """``config.json`` as a `ModelConfig`; errors name the key, and the file by ``where``."""
    return like_olmo2(Reader(values, where))


def like_olmo2(read: Reader, **more: Any) -> ModelConfig:
    """OLMo 2 and 3; ``more`` are keywords of `like_llama`."""
    bias = read.flag("attention_bias")
    return like_llama(
        read,
        norm=rms(read.number("rms_norm_eps", 1e-5)),
        norms=post_norm,
        qkv_bias=bias,
        output_bias=bias,
        attention={"query_key_norm": "all"},
        **more,
    )


# A norm after each part.
post_norm = norms_at(attention_out="post_attention_layernorm", mlp_out="post_feedforward_layernorm")
