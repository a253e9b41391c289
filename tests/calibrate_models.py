"""Tiny models with random weights as transformers writes them, with a tokenizer of whole words, and text for them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from penjing.checkpoint import open_checkpoint

SHAPE: dict[str, Any] = {
    **{"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64},
    **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
}
SLIDING = {"head_dim": 8, "sliding_window": 5, "query_pre_attn_scalar": 12}
MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8, "norm_topk_prob": True}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-tied": {"tie_word_embeddings": True},
    "qwen3_moe": MOE,
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gemma2": SLIDING,
    "gemma3_text": SLIDING | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "gpt_neox": {},
    "phi3": {},
    "bert": {},
    "cohere": {},  # no description in Penjing
}


def make(folder: Path, name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """The model, in float32 computed with the weights as they are saved in ``dtype``."""
    torch.manual_seed(0)
    family = name.partition("-")[0]
    config = transformers.AutoConfig.for_model(family, **{**SHAPE, **FAMILIES[name], **changes})
    kind = transformers.AutoModelForMaskedLM if family == "bert" else transformers.AutoModelForCausalLM
    model = kind.from_config(config).float().eval()
    with torch.no_grad():
        for key, tensor in model.named_parameters():
            tensor.normal_(1.0 if "norm" in key.lower() else 0.0, 0.3)
    model.to(dtype).save_pretrained(folder)
    words = {f"w{i}": i for i in range(SHAPE["vocab_size"])}
    tokenizer = {
        "version": "1.0",
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "w0"},
        "pre_tokenizer": {"type": "WhitespaceSplit"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return model.float()


def workplace(folder: Path, tokens: int = 400) -> Path:
    """The folder, with a Llama in ``model`` and so many words for it in ``text.txt``."""
    make(folder / "model", "llama")
    (folder / "text.txt").write_text(text(tokens))
    return folder


def numbers(folder: Path) -> dict[str, Any]:
    """Each tensor that a model saved in a folder has, by name: weights as they are stored."""
    saved = open_checkpoint(folder)
    return {name: saved.weight(name.removesuffix(".weight")) for name in saved.names}


def stopping_after(reports: int) -> Callable[[float, float], None]:
    """Progress of a run that somebody interrupts at so many reports of it."""

    def progress(done: float, total: float) -> None:
        nonlocal reports
        reports -= 1
        if not reports:
            raise KeyboardInterrupt

    return progress


def text(tokens: int = 400, seed: int = 0, low: int = 3) -> str:
    """Words of `SHAPE`'s vocabulary, ten a line."""
    words = [f"w{i}" for i in np.random.default_rng(seed).integers(low, SHAPE["vocab_size"], tokens)]
    return "\n".join(" ".join(words[i : i + 10]) for i in range(0, tokens, 10)) + "\n"
