"""From a checkpoint's tensors to the weights that a description names, wherever and however they are stored."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..checkpoint import Checkpoint, Weight
from ..errors import BadCheckpoint
from ..formats import mxfp4
from ..formats.affine import AffineTensor
from ..formats.bitmask import BitmaskTensor
from ..formats.floats import FloatTensor
from ..formats.mxfp4 import Mxfp4Tensor
from ..kernels import Matrix, Screen, can_screen, matrix_from, screen_of, screen_shape
from .cache import WeightCache
from .config import Experts, LatentAttention, Linear, ModelConfig, Norm, Source
from .layers import Array, LinearLayer

# What products do with activations: "auto" is what is served by default, "float" keeps them as they are.
Activations: TypeAlias = Literal["auto", "float"]


def check_tensors(checkpoint: Checkpoint, config: ModelConfig) -> None:
    """Every tensor that the model needs is there, in the right shape and dtype, or BadCheckpoint names the first.

    Headers alone are read, those of packed weights included.
    """
    checkpoint.check_weight(config.embedding, (config.vocab_size, config.hidden))
    if (extra := config.per_layer) is not None:
        width = config.layers * extra.inner
        checkpoint.check_weight(config.stem + extra.table, (extra.vocab_size, width))
        checkpoint.check_weight(config.stem + extra.projection, (width, config.hidden))
        _check_norm(checkpoint, config.stem, extra.norm)
    for index, block in enumerate(config.blocks):
        prefix = f"{config.block(index)}."
        for norm in block.norms.values():
            _check_norm(checkpoint, prefix, norm)
        experts = block.mlp.count if isinstance(block.mlp, Experts) else 0
        for linear in block.linears:
            _check_linear(checkpoint, prefix, linear, experts)
        for vector in block.vectors.values():
            checkpoint.check_tensor(f"{prefix}{vector.name}", vector.shape)
    _check_norm(checkpoint, config.stem, config.final_norm)
    if not config.tied_embeddings:
        checkpoint.check_weight(config.head, (config.vocab_size, config.hidden))
    _check_end(checkpoint, config)


def _check_end(checkpoint: Checkpoint, config: ModelConfig) -> None:
    """No layer comes after the last that config.json calls for, but those that guess tokens beyond the next."""
    if checkpoint.config.get("num_nextn_predict_layers"):
        return
    prefix = f"{config.block(config.layers)}."
    if beyond := [name for name in checkpoint.infos if name.startswith(prefix)]:
        raise BadCheckpoint(
            f"{checkpoint.file_of(beyond[0])}: tensor {beyond[0]} is beyond the layers that config.json calls for:"
            f" num_hidden_layers = {config.layers}"
        )


def _check_norm(checkpoint: Checkpoint, prefix: str, norm: Norm) -> None:
    for name in (norm.weight, norm.bias):
        if name is not None:
            checkpoint.check_tensor(f"{prefix}{name}", (norm.size,))


def _check_linear(checkpoint: Checkpoint, prefix: str, linear: Linear, experts: int) -> None:
    source = locate(checkpoint, prefix, linear)
    rows, columns = source.total or linear.shape[0], linear.shape[1]
    name, all_of = f"{prefix}{source.name}", () if source.expert is None else (experts,)
    if source.expert is None:
        checkpoint.check_weight(name, (rows, columns))
    elif name in checkpoint.infos:
        checkpoint.check_tensor(name, (experts, columns, rows) if source.transposed else (experts, rows, columns))
    else:
        groups = columns // mxfp4.BLOCK
        checkpoint.check_tensor(f"{name}_blocks", (experts, rows, groups, mxfp4.BLOCK // 2), [np.uint8])
        checkpoint.check_tensor(f"{name}_scales", (experts, rows, groups), [np.uint8])
    if linear.bias:
        checkpoint.check_tensor(f"{prefix}{source.bias}", (*all_of, rows))


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
    """A block's weight (out, in) as it is stored: an array, integers or floats with their steps, a bitmask, or MXFP4.

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
    if isinstance(weight, FloatTensor):
        return weight.rows(chosen)
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
        blocks, scales = (checkpoint.read(f"{name}_{part}", own)[0] for part in ("blocks", "scales"))
        if (scales == mxfp4.NAN).any():
            raise BadCheckpoint(f"{checkpoint.path}: tensor {name}_scales has a NaN (of expert {expert})")
        return Mxfp4Tensor(*(part if chosen is None else part[chosen] for part in (blocks, scales)))
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


def make_matrix(checkpoint: Checkpoint, module: str, weight: Weight | Mxfp4Tensor, activations: Activations) -> Matrix:
    """A weight in the layout of its kernel; ``module`` says what config.json wants of its activations."""
    stored = checkpoint.activations(module)
    if stored == "float" and activations == "auto":
        return matrix_from(weight, activations="int8-groups")
    return matrix_from(weight, activations=stored)


def _kept(cache: WeightCache | None, name: str, shape: tuple[int, int], build: Callable[[], Matrix]) -> Matrix:
    return build() if cache is None else cache.matrix(name, shape, build)


def load_matrix(
    checkpoint: Checkpoint,
    module: str,
    shape: tuple[int, int],
    activations: Activations = "auto",
    cache: WeightCache | None = None,
) -> Matrix:
    """A module's weight (out, in), in the layout of the kernel that computes on what it is stored in."""

    def build() -> Matrix:
        weight = checkpoint.weight(module)
        if tuple(weight.shape) != shape:
            raise _wrong_shape(checkpoint, f"{module}.weight", tuple(weight.shape), shape)
        return make_matrix(checkpoint, module, weight, activations)

    return _kept(cache, module, shape, build)


def load_linear(
    checkpoint: Checkpoint,
    prefix: str,
    linear: Linear,
    activations: Activations = "auto",
    cache: WeightCache | None = None,
) -> LinearLayer:
    def build() -> Matrix:
        weight = read_weight(checkpoint, prefix, linear)
        return make_matrix(checkpoint, f"{prefix}{locate(checkpoint, prefix, linear).name}", weight, activations)

    matrix = _kept(cache, f"{prefix}{linear.role}", linear.shape, build)
    return LinearLayer(matrix, read_bias(checkpoint, prefix, linear))


@dataclass(frozen=True)
class BlockWeights:
    """A block's weights as the native decoder takes them.

    linears: by role.  norms: by place, weight and bias, float32.  vectors: by name, float32.
    """

    linears: Mapping[str, LinearLayer]
    norms: Mapping[str, tuple[Array, Array | None]]
    vectors: Mapping[str, Array]

    def native(self) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Linears, norms and vectors for `_native.Decoder.add_block`."""
        linears = {role: (layer.matrix.native, layer.bias) for role, layer in self.linears.items()}
        return linears, dict(self.norms), dict(self.vectors)

    @property
    def matrices(self) -> Iterator[Matrix]:
        return (layer.matrix for layer in self.linears.values())


def load_weights(
    checkpoint: Checkpoint,
    config: ModelConfig,
    index: int,
    activations: Activations = "auto",
    cache: WeightCache | None = None,
) -> BlockWeights:
    """The weights of decoder block number ``index``."""
    block, prefix = config.blocks[index], f"{config.block(index)}."
    linears: dict[str, LinearLayer] = {}
    for linear in block.linears:
        if isinstance(block.mixer, LatentAttention) and linear.role in ("k_b", "v_b"):
            linears |= _by_head(checkpoint, prefix, linear, block.mixer, cache)
        else:
            linears[linear.role] = load_linear(checkpoint, prefix, linear, activations, cache)
    norms = {place: read_norm(checkpoint, prefix, norm) for place, norm in block.norms.items()}
    vectors = {name: read_vector(checkpoint, prefix + each.name, each.shape) for name, each in block.vectors.items()}
    if "convolution" in vectors:  # (channels, 1, kernel): the decoder goes through the channels of one tap
        vectors["convolution"] = np.ascontiguousarray(vectors["convolution"][:, 0].T)
    return BlockWeights(linears, norms, vectors)


def _by_head(
    checkpoint: Checkpoint, prefix: str, linear: Linear, mixer: LatentAttention, cache: WeightCache | None
) -> dict[str, LinearLayer]:
    """k_b and v_b as a matrix a head, that of the keys transposed: it is multiplied into the queries.

    Floats stay what they are; integers become float32, since their groups do not survive transposing.
    """

    @functools.cache
    def heads() -> list[Array]:
        weight = read_weight(checkpoint, prefix, linear)
        plain = weight if isinstance(weight, np.ndarray) else weight.decode()
        return [head.T if linear.role == "k_b" else head for head in np.split(plain, mixer.heads)]

    rows, columns = linear.shape[0] // mixer.heads, linear.shape[1]
    shape = (columns, rows) if linear.role == "k_b" else (rows, columns)
    layers = {}
    for number in range(mixer.heads):
        build = functools.partial(lambda n: matrix_from(np.ascontiguousarray(heads()[n]), sparse=False), number)
        role = f"{linear.role}.{number}"
        layers[role] = LinearLayer(_kept(cache, f"{prefix}{role}", shape, build), None)
    return layers


def load_embedding(
    checkpoint: Checkpoint, config: ModelConfig, activations: Activations = "auto", cache: WeightCache | None = None
) -> Matrix:
    """The embedding (vocabulary, hidden): rows are tokens."""
    return load_matrix(checkpoint, config.embedding, (config.vocab_size, config.hidden), activations, cache)


def load_final_norm(checkpoint: Checkpoint, config: ModelConfig) -> tuple[Array, Array | None]:
    """Weight and bias of the last norm."""
    return read_norm(checkpoint, config.stem, config.final_norm)


def load_head(
    checkpoint: Checkpoint, config: ModelConfig, activations: Activations = "auto", cache: WeightCache | None = None
) -> Matrix:
    """What turns hidden states into logits (vocabulary, hidden): its own weights, or the embedding's."""
    return load_matrix(checkpoint, config.head, (config.vocab_size, config.hidden), activations, cache)


def load_screen(config: ModelConfig, head: Matrix, cache: WeightCache | None = None) -> Screen | None:
    """What finds the head's greatest logit by half of its bytes; None where it has none.

    Integers are read as fast as their screen would be, and a soft cap makes different products equal.
    """
    if not can_screen(head) or config.logit_softcap or not 2**-20 <= config.logit_scale <= 2**20:
        return None
    shape = screen_shape(head.rows, head.columns)
    screen = _kept(cache, f"{config.head}.screen", shape, lambda: screen_of(head))
    return screen if isinstance(screen, Screen) else screen_of(head)
