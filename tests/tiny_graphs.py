"""Tiny random models of families that Penjing has no description of, written by transformers, which is their oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SHAPE: dict[str, Any] = {
    **{"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64},
    **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
# The family → what differs from `SHAPE`: transposed weights, ALiBi, fused projections, experts, recurrent states.
GRAPHS: dict[str, dict[str, Any]] = {
    "gpt2": GPT,
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "bloom": {"n_layer": 2, "n_head": 4},
    "falcon": {"num_kv_heads": 2, "new_decoder_architecture": True},
    "stablelm": {"use_qkv_bias": True},
    "cohere": {},
    "nemotron": {"head_dim": 8},
    "mamba": {"state_size": 8, "time_step_rank": 16},
    "phimoe": {"num_local_experts": 4},
    "granitemoe": {"num_local_experts": 4},
    "granitemoehybrid": {
        **{"num_local_experts": 4, "layer_types": ["mamba", "attention"], "mamba_n_heads": 8},
        **{"mamba_d_head": 8, "mamba_d_state": 8, "shared_intermediate_size": 16},
    },
}


def make_graph(folder: Path, family: str, **changes: Any) -> Any:
    """transformers' model in float32 with everything that is stored random; its folder is ``folder``."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **{**SHAPE, **GRAPHS[family], **changes})
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    stored = set(model.state_dict())
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("A_log"):
                tensor.uniform_(0, 1)
            elif name in stored and tensor.is_floating_point():
                tensor.normal_(1.0 if "norm" in name or "ln_" in name else 0.0, 0.3)
    model.save_pretrained(folder)
    return model
