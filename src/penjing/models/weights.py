"""From a checkpoint's tensors to the weights that a description names, wherever and however they are stored."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..checkpoint import Checkpoint, Weight
from ..errors import BadCheckpoint, Unsupported
from ..formats.affine import AffineTensor
from ..formats.bitmask import BitmaskTensor
from ..formats.mxfp4 import Mxfp4Tensor
from ..kernels import Matrix, matrix_from
from ..kernels.decoder import MAX_HEAD_DIM
from .config import Attention, Linear, Mlp, ModelConfig, Norm, Source
from .config import Block as Described
from .layers import Array, Block, LinearLayer


def check_tensors(checkpoint: Checkpoint, config: ModelConfig) -> None:
    """Every tensor that the model needs is there, or BadCheckpoint names the first that is not.

    Shapes are compared too, except those of packed weights, which are only known once they are read.
    """
    _check_module(checkpoint, config.embedding, (config.vocab_size, config.hidden))
    if (extra := config.per_layer) is not None:
        width = config.layers * extra.inner
        _check_module(checkpoint, config.stem + extra.table, (extra.vocab_size, width))
        _check_module(checkpoint, config.stem + extra.projection, (width, config.hidden))
        _check_norm(checkpoint, config.stem, extra.norm)
    for index, block in enumerate(config.blocks):
        prefix = f"{config.block(index)}."
        for norm in block.norms.values():
            _check_norm(checkpoint, prefix, norm)
        for linear in block.linears:
            source = locate(checkpoint, prefix, linear)
            _check_source(checkpoint, prefix, linear, source)
            if linear.bias:
                _check(checkpoint, f"{prefix}{source.bias}")
        for vector in block.vectors.values():
            _check(checkpoint, f"{prefix}{vector.name}", vector.shape)
    _check_norm(checkpoint, config.stem, config.final_norm)
    if not config.tied_embeddings:
        _check_module(checkpoint, config.head, (config.vocab_size, config.hidden))


def _check(checkpoint: Checkpoint, name: str, shape: tuple[int, ...] | None = None) -> None:
    if name not in checkpoint.infos:
        raise BadCheckpoint(f"{checkpoint.path}: tensor {name} is missing; config.json calls for it")
    if shape is not None and checkpoint.infos[name].shape != shape:
        raise _wrong_shape(checkpoint, name, checkpoint.infos[name].shape, shape)


def _check_norm(checkpoint: Checkpoint, prefix: str, norm: Norm) -> None:
    for name in (norm.weight, norm.bias):
        if name is not None:
            _check(checkpoint, f"{prefix}{name}", (norm.size,))


def _check_module(checkpoint: Checkpoint, module: str, shape: tuple[int, ...]) -> None:
    if not checkpoint.is_compressed(module):
        _check(checkpoint, f"{module}.weight", shape)


def _check_source(checkpoint: Checkpoint, prefix: str, linear: Linear, source: Source) -> None:
    rows, columns = source.total or linear.shape[0], linear.shape[1]
    name = f"{prefix}{source.name}"
    if source.expert is None:
        _check_module(checkpoint, name, (rows, columns))
    elif name in checkpoint.infos:
        right = (columns, rows) if source.transposed else (rows, columns)
        found = checkpoint.infos[name].shape
        if found[1:] != right or found[0] <= source.expert:
            raise _wrong_shape(checkpoint, name, found, (max(found[0], source.expert + 1), *right))


def _wrong_shape(checkpoint: Checkpoint, name: str, shape: tuple[int, ...], right: tuple[int, ...]) -> BadCheckpoint:
    return BadCheckpoint(f"{checkpoint.path}: tensor {name} has shape {shape}, config.json calls for {right}")


def locate(checkpoint: Checkpoint, prefix: str, linear: Linear) -> Source:
    """The first of a weight's sources that the checkpoint has; BadCheckpoint names the usual one if it has none."""
    for source in linear.sources:
        name = f"{prefix}{source.name}"
        if source.expert is None:
            found = f"{name}.weight" in checkpoint.infos or checkpoint.is_compressed(name)
        else:
            found = name in checkpoint.infos or f"{name}_blocks" in checkpoint.infos
        if found:
            return source
    raise BadCheckpoint(f"{checkpoint.path}: tensor {prefix}{linear.name}.weight is missing; config.json calls for it")


def read_weight(checkpoint: Checkpoint, prefix: str, linear: Linear) -> Weight | Mxfp4Tensor:
    """A block's weight (out, in) as it is stored: an array, integers with their steps, a bitmask, or MXFP4.

    prefix: what the block's names begin with, dot included.
    """
    source = locate(checkpoint, prefix, linear)
    weight = (
        _read_expert(checkpoint, prefix, source) if source.expert is not None else _read(checkpoint, prefix, source)
    )
    if tuple(weight.shape) != linear.shape:
        raise _wrong_shape(checkpoint, f"{prefix}{source.name}.weight", tuple(weight.shape), linear.shape)
    return weight


def _read(checkpoint: Checkpoint, prefix: str, source: Source) -> Weight:
    module = f"{prefix}{source.name}"
    if source.rows is None:
        return checkpoint.weight(module)
    if len(source.rows) == source.rows[0].times == 1 and not checkpoint.is_compressed(module):
        run = source.rows[0]  # one piece of a plain matrix: the rest is not read
        return checkpoint.read(f"{module}.weight", slice(run.start, run.start + run.count))
    return rows_of(checkpoint.weight(module), source)


def rows_of(weight: Weight, source: Source) -> Weight:
    """The rows that a source names of its module's weight."""
    chosen = source.indices()
    if chosen is None:
        return weight
    if isinstance(weight, BitmaskTensor):
        weight = weight.decode()
    if isinstance(weight, np.ndarray):
        return np.ascontiguousarray(weight[chosen])
    apart = weight.scale.shape[0] == weight.shape[0]  # not one step for the whole matrix
    return AffineTensor(
        np.ascontiguousarray(weight.codes[chosen]),
        np.ascontiguousarray(weight.scale[chosen]) if apart else weight.scale,
        np.ascontiguousarray(weight.zero_point[chosen]) if apart and weight.zero_point is not None else None,
        weight.grid,
    )


def _read_expert(checkpoint: Checkpoint, prefix: str, source: Source) -> NDArray[np.generic] | Mxfp4Tensor:
    """One expert of a tensor of all."""
    name, expert = f"{prefix}{source.name}", source.expert or 0
    own, chosen = slice(expert, expert + 1), source.indices()
    if name not in checkpoint.infos:
        parts = [checkpoint.read(f"{name}_{part}", own)[0] for part in ("blocks", "scales")]
        return Mxfp4Tensor(*(part if chosen is None else part[chosen] for part in parts))
    whole = checkpoint.read(name, own)[0]
    matrix = whole.T if source.transposed else whole
    return np.ascontiguousarray(matrix if chosen is None else matrix[chosen])


def read_bias(checkpoint: Checkpoint, prefix: str, linear: Linear) -> Array | None:
    """A block's bias, float32 (out,), or None if it has none."""
    if not linear.bias:
        return None
    source = locate(checkpoint, prefix, linear)
    stored = checkpoint.tensor(f"{prefix}{source.bias}")
    bias = stored if source.expert is None else stored[source.expert]
    right = (source.total or linear.shape[0],)
    if bias.shape != right:
        raise _wrong_shape(checkpoint, f"{prefix}{source.bias}", bias.shape, right)
    chosen = source.indices()
    return (bias if chosen is None else bias[chosen]).astype(np.float32)


def read_vector(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> Array:
    """A tensor that is computed with in float32."""
    vector = checkpoint.tensor(name)
    if vector.shape != shape:
        raise _wrong_shape(checkpoint, name, vector.shape, shape)
    return vector.astype(np.float32)


def read_norm(checkpoint: Checkpoint, prefix: str, norm: Norm) -> tuple[Array, Array | None]:
    """What a norm multiplies with, offset and scale included, and what it adds; float32 (size,)."""
    ones = np.ones(norm.size, np.float32)
    weight = ones if norm.weight is None else read_vector(checkpoint, f"{prefix}{norm.weight}", (norm.size,))
    bias = None if norm.bias is None else read_vector(checkpoint, f"{prefix}{norm.bias}", (norm.size,))
    return (weight + np.float32(norm.offset)) * np.float32(norm.scale), bias


def load_matrix(checkpoint: Checkpoint, module: str, shape: tuple[int, int]) -> Matrix:
    """A module's weight (out, in), in the layout of the kernel that computes on what it is stored in."""
    weight = checkpoint.weight(module)
    if tuple(weight.shape) != shape:
        raise _wrong_shape(checkpoint, f"{module}.weight", tuple(weight.shape), shape)
    return matrix_from(weight, activations=checkpoint.activations(module))


def load_linear(checkpoint: Checkpoint, prefix: str, linear: Linear) -> LinearLayer:
    source = locate(checkpoint, prefix, linear)
    activations = checkpoint.activations(f"{prefix}{source.name}")
    matrix = matrix_from(read_weight(checkpoint, prefix, linear), activations=activations)
    return LinearLayer(matrix, read_bias(checkpoint, prefix, linear))


def load_block(checkpoint: Checkpoint, config: ModelConfig, index: int) -> Block:
    """Decoder block number ``index``, with its weights in memory; Unsupported if it is not of Llama's kind."""
    block, prefix = config.blocks[index], f"{config.block(index)}."
    if not isinstance(block.mixer, Attention) or not _like_llama(config, block, block.mixer):
        raise Unsupported(f"{checkpoint.path}: the kernels compute no blocks like those of {config.family}")
    linears = {linear.role: load_linear(checkpoint, prefix, linear) for linear in block.linears}
    norms = {place: read_norm(checkpoint, prefix, norm)[0] for place, norm in block.norms.items()}
    return Block(
        **linears,
        attention_norm=norms["attention_in"],
        mlp_norm=norms["mlp_in"],
        query_norm=norms.get("query"),
        key_norm=norms.get("key"),
        attention=block.mixer,
        eps=config.final_norm.eps,
    )


def _like_llama(config: ModelConfig, block: Described, mixer: Attention) -> bool:
    return (
        (config.embedding_scale, config.logit_scale, config.logit_softcap, config.per_layer) == (1, 1, 0, None)
        and mixer.rope is not None
        and not (mixer.softcap or mixer.sinks or mixer.output_gate or mixer.values_are_keys or mixer.query_growth)
        and (mixer.shares_kv_of, mixer.query_key_norm == "all", mixer.rope_interleaved) == (None, False, False)
        and mixer.scale == mixer.head_dim**-0.5
        and mixer.head_dim <= MAX_HEAD_DIM
        and isinstance(block.mlp, Mlp)
        and (block.mlp.activation, block.mlp.gated) == ("silu", True)
        and set(block.norms) - {"query", "key"} == {"attention_in", "mlp_in"}
        and all(norm.kind == "rms" for norm in block.norms.values())
        and (block.parallel, block.residual_scale, block.per_layer_inner, len(block.vectors)) == (False, 1, 0, 0)
    )


def load_embedding(checkpoint: Checkpoint, config: ModelConfig) -> Matrix:
    """The embedding (vocabulary, hidden): rows are tokens."""
    return load_matrix(checkpoint, config.embedding, (config.vocab_size, config.hidden))


def load_final_norm(checkpoint: Checkpoint, config: ModelConfig) -> Array:
    return read_norm(checkpoint, config.stem, config.final_norm)[0]


def load_head(checkpoint: Checkpoint, config: ModelConfig) -> Matrix:
    """What turns hidden states into logits (vocabulary, hidden): its own weights, or the embedding's."""
    return load_matrix(checkpoint, config.head, (config.vocab_size, config.hidden))
