"""One family a file, named as ``config.json`` names it in ``model_type``: ``read(values, where) -> ModelConfig``."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ...checkpoint import Checkpoint
from ...errors import BadCheckpoint, Unsupported, nearest
from ..config import ModelConfig

FAMILIES = (
    "deepseek_v2",
    "deepseek_v3",
    "gemma",
    "gemma2",
    "gemma3",
    "gemma4",
    "glm4",
    "glm4_moe",
    "gpt_neox",
    "gpt_oss",
    "granite",
    "llama",
    "ministral",
    "ministral3",
    "mistral",
    "mixtral",
    "olmo2",
    "olmo3",
    "olmoe",
    "phi3",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_moe",
    "qwen3_next",
    "smollm3",
    "starcoder2",
)
# Models that see and read, of which the text is computed → what the text is where ``text_config`` does not say.
_TOWERS = {
    "gemma3": "gemma3_text",
    "gemma4": "gemma4_text",
    "mistral3": "mistral",
    "qwen3_5": "qwen3_5_text",
    "qwen3_5_moe": "qwen3_5_moe_text",
}
_STEMS = ("model.", "model.language_model.", "language_model.model.", "language_model.", "")
_HEADS = ("lm_head", "language_model.lm_head", "model.lm_head")


def is_described(values: Mapping[str, Any]) -> bool:
    """Is there a description, or must there be one? Models that see and read run by theirs or not at all."""
    family = values.get("model_type")
    return values.get("text_config") is not None or (
        not isinstance(family, str) or family.removesuffix("_text") in FAMILIES
    )


def describe(values: Mapping[str, Any], where: str) -> ModelConfig:
    """The description of the model whose ``config.json`` says ``values``; ``where`` is that file, for errors.

    Raises Unsupported for a family that is not in `FAMILIES`, BadCheckpoint for values that cannot be.
    """
    if values.get("text_config") is not None:
        values = _text(values, where)
    family = values.get("model_type")
    if not isinstance(family, str):
        raise BadCheckpoint(f"{where}: model_type is missing; it names the family, e.g. 'llama'")
    name = family.removesuffix("_text")
    if name not in FAMILIES:
        raise Unsupported(
            f"{where}: model_type = {family!r} is not a family with a description; {nearest(name, FAMILIES)}"
        )
    config: ModelConfig = importlib.import_module(f".{name}", __name__).read(values, where)
    return config


def read_family(checkpoint: Checkpoint, values: Mapping[str, Any]) -> ModelConfig:
    """As `describe`, with the names that the checkpoint's tensors have."""
    config = _placed(describe(values, f"{checkpoint.path}/config.json"), checkpoint)
    if values.get("text_config") is not None and values.get("tie_word_embeddings") is None:
        # What a model of text and pictures takes where nothing is said is not what its text does alone.
        config = replace(config, tied_embeddings=not _has(checkpoint, config.head_name))
    return config


def _text(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """``text_config``, with what is said of the whole model."""
    text, family = values["text_config"], values.get("model_type")
    if not isinstance(text, dict):
        raise BadCheckpoint(f"{where}: text_config = {text!r}, expected an object")
    if family not in _TOWERS:
        raise Unsupported(
            f"{where}: model_type = {family!r} is not one whose text is read; {nearest(str(family), _TOWERS)}"
        )
    whole = ("bos_token_id", "eos_token_id", "tie_word_embeddings", "architectures")
    outer = {key: values[key] for key in whole if values.get(key) is not None}
    return {"model_type": _TOWERS[family], **text, **outer}


def _placed(config: ModelConfig, checkpoint: Checkpoint) -> ModelConfig:
    """The description with the names that its parts have in models of text and pictures, whichever they are."""
    for stem in (config.stem, *_STEMS):
        if _has(checkpoint, f"{stem}{config.embedding_name}"):
            config = replace(config, stem=stem)
            break
    for head in (config.head_name, *_HEADS):
        if _has(checkpoint, head):
            return replace(config, head_name=head)
    return config


def _has(checkpoint: Checkpoint, module: str) -> bool:
    return f"{module}.weight" in checkpoint.infos or checkpoint.is_compressed(module)
