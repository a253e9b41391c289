"""From a checkpoint's tensors to the layers that compute on them, one block at a time."""

from __future__ import annotations

import numpy as np

from ..checkpoint import Checkpoint
from ..errors import BadCheckpoint
from ..kernels import Matrix, matrix_from
from .config import EMBEDDING, FINAL_NORM, HEAD, Linear, ModelConfig
from .layers import Array, Block, LinearLayer


def check_tensors(checkpoint: Checkpoint, config: ModelConfig) -> None:
    """Every tensor that the model needs is there, or BadCheckpoint names the first that is not.

    Shapes are compared too, except those of packed weights, which are only known once they are read.
    """
    names = set(checkpoint.names)
    for name, shape in config.tensors():
        if name not in names:
            raise BadCheckpoint(f"{checkpoint.path}: tensor {name} is missing; config.json calls for it")
        if name in checkpoint.infos and checkpoint.infos[name].shape != shape:
            raise _wrong_shape(checkpoint, name, checkpoint.infos[name].shape, shape)


def _wrong_shape(checkpoint: Checkpoint, name: str, shape: tuple[int, ...], right: tuple[int, ...]) -> BadCheckpoint:
    return BadCheckpoint(f"{checkpoint.path}: tensor {name} has shape {shape}, config.json calls for {right}")


def load_vector(checkpoint: Checkpoint, name: str, size: int) -> Array:
    """A norm or a bias, float32 (size,)."""
    vector = checkpoint.tensor(name)
    if vector.shape != (size,):
        raise _wrong_shape(checkpoint, name, vector.shape, (size,))
    return vector.astype(np.float32)


def load_matrix(checkpoint: Checkpoint, module: str, shape: tuple[int, int]) -> Matrix:
    """A module's weight (out, in), in the layout of the kernel that computes on what it is stored in."""
    weight = checkpoint.weight(module)
    if tuple(weight.shape) != shape:
        raise _wrong_shape(checkpoint, f"{module}.weight", tuple(weight.shape), shape)
    return matrix_from(weight, activations=checkpoint.activations(module))


def load_linear(checkpoint: Checkpoint, prefix: str, linear: Linear) -> LinearLayer:
    module = f"{prefix}.{linear.name}"
    bias = load_vector(checkpoint, f"{module}.bias", linear.shape[0]) if linear.bias else None
    return LinearLayer(load_matrix(checkpoint, module, linear.shape), bias)


def load_block(checkpoint: Checkpoint, config: ModelConfig, index: int) -> Block:
    """Decoder block number ``index``, with its weights in memory."""
    prefix = config.block(index)
    linears = {linear.role: load_linear(checkpoint, prefix, linear) for linear in config.linears}
    norms = {name: load_vector(checkpoint, f"{prefix}.{name}.weight", size) for name, size in config.norms.items()}
    return Block(
        **linears,
        attention_norm=norms["input_layernorm"],
        mlp_norm=norms["post_attention_layernorm"],
        query_norm=norms.get("self_attn.q_norm"),
        key_norm=norms.get("self_attn.k_norm"),
        window=config.sliding_windows[index],
        head_dim=config.head_dim,
        eps=config.norm_eps,
    )


def load_embedding(checkpoint: Checkpoint, config: ModelConfig) -> Matrix:
    """The embedding (vocabulary, hidden): rows are tokens."""
    return load_matrix(checkpoint, EMBEDDING, (config.vocab_size, config.hidden))


def load_final_norm(checkpoint: Checkpoint, config: ModelConfig) -> Array:
    return load_vector(checkpoint, f"{FINAL_NORM}.weight", config.hidden)


def load_head(checkpoint: Checkpoint, config: ModelConfig) -> Matrix:
    """What turns hidden states into logits (vocabulary, hidden): its own weights, or the embedding's."""
    return load_matrix(checkpoint, EMBEDDING if config.tied_embeddings else HEAD, (config.vocab_size, config.hidden))
