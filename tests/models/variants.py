"""A tiny configuration of every family, and of each of its switches: name → (model_type, what differs from `SHAPE`)."""

from __future__ import annotations

from typing import Any

SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 24,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
ROPE = {"rope_theta": 10000.0}
FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"
YARN = {"rope_theta": 500.0, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    **{"rope_theta": 500.0, "rope_type": "llama3", "factor": 8.0},
    **{"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
}
MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
NET = {
    **{"head_dim": 8, "linear_key_head_dim": 8, "linear_value_head_dim": 6},
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "layer_types": [LINEAR, FULL, LINEAR]},
}
LATENT = {
    **{"num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 12, "qk_nope_head_dim": 8},
    **{"qk_rope_head_dim": 4, "v_head_dim": 6, "first_k_dense_replace": 1, "n_shared_experts": 2},
    **{"n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20},
}
GEMMA4 = {
    **{"head_dim": 8, "global_head_dim": 16, "sliding_window": 5, "layer_types": [SLIDING, SLIDING, FULL]},
    **{"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 97},
}


def longrope(pairs: int) -> dict[str, Any]:
    short, long = [1.0 + 0.1 * i for i in range(pairs)], [2.0 + 0.5 * i for i in range(pairs)]
    return {"rope_theta": 500.0, "rope_type": "longrope", "short_factor": short, "long_factor": long}


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-mha": ("llama", {"num_key_value_heads": 4}),
    "llama-mqa": ("llama", {"num_key_value_heads": 1}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-wide-heads": ("llama", {"head_dim": 10, "rms_norm_eps": 1e-2}),
    "llama-gelu": ("llama", {"hidden_act": "gelu"}),
    "llama-linear": ("llama", {"rope_parameters": {**ROPE, "rope_type": "linear", "factor": 3.0}}),
    "llama-dynamic": ("llama", {"rope_parameters": {**ROPE, "rope_type": "dynamic", "factor": 3.0}}),
    "llama3": ("llama", {"head_dim": 16, "rope_parameters": LLAMA3}),
    "llama-yarn": ("llama", {"head_dim": 16, "rope_parameters": {**YARN, "beta_fast": 4.0, "beta_slow": 1.0}}),
    "llama-yarn-mscale": (
        "llama",
        {
            "head_dim": 16,
            "rope_parameters": {**YARN, **ROPE, "mscale": 0.7, "mscale_all_dim": 1.3, "truncate": False},
        },
    ),
    "mistral-window": ("mistral", {"sliding_window": 5}),
    "mistral-no-window": ("mistral", {"sliding_window": None, "head_dim": 8}),
    "ministral": ("ministral", {"head_dim": 8, "sliding_window": 5, "layer_types": [SLIDING, FULL, SLIDING]}),
    "ministral3": (
        "ministral3",
        {
            "head_dim": 16,
            "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.3},
        },
    ),
    "qwen2": ("qwen2", {}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 8}),
    "qwen3-biases": ("qwen3", {"head_dim": 8, "attention_bias": True, "tie_word_embeddings": True}),
    "gemma": ("gemma", {"head_dim": 8}),
    "gemma2": ("gemma2", {"head_dim": 8, "sliding_window": 5, "query_pre_attn_scalar": 12}),
    "gemma2-no-caps": (
        "gemma2",
        {"head_dim": 8, "attn_logit_softcapping": None, "final_logit_softcapping": None, "layer_types": [FULL] * 3},
    ),
    "gemma3": (
        "gemma3_text",
        {"head_dim": 8, "sliding_window": 5, "layer_types": [SLIDING, FULL, SLIDING], "query_pre_attn_scalar": 12},
    ),
    "gemma3-stretched": (
        "gemma3_text",
        {
            "head_dim": 8,
            "sliding_window": 5,
            "layer_types": [SLIDING, FULL, SLIDING],
            "rope_parameters": {
                FULL: {"rope_theta": 900.0, "rope_type": "linear", "factor": 8.0},
                SLIDING: {"rope_theta": 50.0, "rope_type": "default"},
            },
        },
    ),
    "phi3": ("phi3", {"sliding_window": 7}),
    "phi3-long": (
        "phi3",
        {"hidden_size": 32, "original_max_position_embeddings": 16, "rope_parameters": longrope(4)},
    ),
    "phi3-short": (
        "phi3",
        {"hidden_size": 32, "original_max_position_embeddings": 48, "rope_parameters": longrope(4)},
    ),
    "phi4": (
        "phi3",
        {
            "hidden_size": 32,
            "original_max_position_embeddings": 16,
            "tie_word_embeddings": True,
            "rope_parameters": {**longrope(2), "partial_rotary_factor": 0.5},
        },
    ),
    "granite": (
        "granite",
        {
            **{"attention_multiplier": 0.2, "embedding_multiplier": 3.0, "logits_scaling": 2.0},
            **{"residual_multiplier": 0.4, "tie_word_embeddings": True},
        },
    ),
    "granite-biases": ("granite", {"attention_multiplier": 0.3, "attention_bias": True, "mlp_bias": True}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {"sliding_window": 5, "layer_types": [SLIDING, FULL, SLIDING]}),
    "olmo3-yarn": (
        "olmo3",
        {
            "sliding_window": 5,
            "head_dim": 16,
            "layer_types": [SLIDING, FULL, SLIDING],
            "rope_parameters": {FULL: YARN, SLIDING: {"rope_theta": 500.0, "rope_type": "default"}},
        },
    ),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0, 1]}),
    "smollm3-window": (
        "smollm3",
        {"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 5, "attention_bias": True},
    ),
    "starcoder2": ("starcoder2", {"sliding_window": 6}),
    "starcoder2-untied": ("starcoder2", {"use_bias": False, "tie_word_embeddings": False}),
    "gpt_neox": ("gpt_neox", {"hidden_size": 64}),
    "gpt_neox-serial": (
        "gpt_neox",
        {
            "use_parallel_residual": False,
            "hidden_act": "gelu_new",
            "rope_parameters": {"rope_theta": 300.0, "rope_type": "default", "partial_rotary_factor": 1.0},
        },
    ),
    "mixtral": ("mixtral", {"num_local_experts": 5, "sliding_window": 6}),
    "qwen2_moe": ("qwen2_moe", {**MOE, "shared_expert_intermediate_size": 28}),
    "qwen2_moe-some": (
        "qwen2_moe",
        {
            **MOE,
            **{"shared_expert_intermediate_size": 28, "norm_topk_prob": True, "decoder_sparse_step": 2},
            **{"qkv_bias": False},
        },
    ),
    "qwen3_moe": ("qwen3_moe", {**MOE, "head_dim": 8, "norm_topk_prob": True, "mlp_only_layers": [1]}),
    "olmoe": ("olmoe", {"num_experts": 6, "num_experts_per_tok": 3}),
    "gpt_oss": (
        "gpt_oss",
        {
            **{"num_local_experts": 5, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 6},
            **{"swiglu_limit": 0.8, "rope_parameters": {**YARN, "truncate": False}},
        },
    ),
    "qwen3_next": ("qwen3_next", {**MOE, **NET, "shared_expert_intermediate_size": 28}),
    "qwen3_5": ("qwen3_5_text", NET),
    "qwen3_5_moe": ("qwen3_5_moe_text", {**MOE, **NET, "shared_expert_intermediate_size": 28}),
    "gemma4": ("gemma4_text", {**GEMMA4, "hidden_size_per_layer_input": 10, "final_logit_softcapping": 9.0}),
    "gemma4-shared": (
        "gemma4_text",
        {
            **GEMMA4,
            **{"num_hidden_layers": 6, "layer_types": [SLIDING, FULL] * 3, "num_kv_shared_layers": 3},
            **{"use_double_wide_mlp": True, "hidden_size_per_layer_input": 10},
        },
    ),
    "gemma4-experts": (
        "gemma4_text",
        {
            **GEMMA4,
            **{"enable_moe_block": True, "num_experts": 6, "top_k_experts": 2, "moe_intermediate_size": 20},
            **{"attention_k_eq_v": True, "num_global_key_value_heads": 1},
        },
    ),
    "glm4": ("glm4", {"head_dim": 8}),
    "glm4_moe": (
        "glm4_moe",
        {
            **{"head_dim": 8, "n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20},
            **{"use_qk_norm": True, "attention_bias": True, "n_group": 2, "topk_group": 1},
        },
    ),
    "deepseek_v2": ("deepseek_v2", {**LATENT, "topk_method": "greedy"}),
    "deepseek_v2-groups": (
        "deepseek_v2",
        {
            **LATENT,
            **{"q_lora_rank": None, "topk_method": "group_limited_greedy", "n_group": 3, "topk_group": 2},
            **{"routed_scaling_factor": 1.7, "num_experts_per_tok": 3},
        },
    ),
    "deepseek_v3": ("deepseek_v3", {**LATENT, "n_group": 3, "topk_group": 2}),
    "deepseek_v3-yarn": (
        "deepseek_v3",
        {
            **LATENT,
            **{"n_group": 1, "topk_group": 1, "rope_interleave": False, "attention_bias": True},
            **{"norm_topk_prob": False, "rope_parameters": {**YARN, "mscale": 0.8, "mscale_all_dim": 1.0}},
        },
    ),
}
