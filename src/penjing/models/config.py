"""What a decoder-only model is, as data: numbers of its computation, and the tensors that it is made of.

A family's file (``llama.py``, …) reads its ``config.json`` into a `ModelConfig`; everything after that — loading,
compressing, computing, counting memory — reads only this. A block mixes positions (``mixer``), then works on each
alone (``mlp``); `Weights` name what either is made of. Names are relative: those of blocks to `ModelConfig.block`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .rope import Rope

Activation: TypeAlias = Literal["silu", "gelu", "gelu_tanh", "clamped"]


@dataclass(frozen=True)
class Norm:
    """kind: "rms" is x / √(mean(x²) + eps), "layer" takes the mean away first (Ba et al., arXiv 1607.06450).

    weight, bias: tensors (size,), None where there is none.  offset: added to the weight (1 where it is stored around
    zero).  scale: a factor on the result.
    """

    weight: str | None
    size: int
    eps: float
    kind: Literal["rms", "layer"] = "rms"
    bias: str | None = None
    offset: float = 0.0
    scale: float = 1.0


@dataclass(frozen=True)
class Run:
    """Rows start … start + count of a stored matrix, ``times`` times, each ``step`` rows after the last."""

    start: int
    count: int
    step: int = 0
    times: int = 1


@dataclass(frozen=True)
class Source:
    """Where a weight is stored.

    name: a module, whose tensors are ``name.weight`` and ``name.bias``; of an expert in a tensor of all experts that
    tensor itself, with ``name_bias`` beside it.  rows: the weight is these of the module's ``total`` rows, one run
    after another; None is all of them.  expert: its number on the first axis of (experts, out, in), or of
    (experts, in, out) if ``transposed``.
    """

    name: str
    rows: tuple[Run, ...] | None = None
    total: int = 0
    expert: int | None = None
    transposed: bool = False

    @property
    def bias(self) -> str:
        return f"{self.name}.bias" if self.expert is None else f"{self.name}_bias"

    def indices(self) -> NDArray[np.int64] | None:
        """Numbers of the stored rows, in the order in which the weight has them; None is all."""
        if self.rows is None:
            return None
        runs = [
            np.arange(run.start, run.start + run.count) + run.step * np.arange(run.times)[:, None] for run in self.rows
        ]
        return np.concatenate([run.ravel() for run in runs])


@dataclass(frozen=True)
class Linear:
    """A weight (out, in) of a block.

    role: which of the block's it is: q, k, v, o, gate, up, down, router, shared.gate, experts.7.up, …
    reads: the activation that goes in; weights that read the same one share its statistics.  makes: the activation
    that its rows become: an element of it goes with a row of all that make it and a column of all that read it.
    sources: where it may be stored; the first that the checkpoint has counts.
    """

    role: str
    reads: str
    makes: str
    shape: tuple[int, int]
    bias: bool
    sources: tuple[Source, ...]

    @property
    def name(self) -> str:
        """The module that it is stored in first of all."""
        return self.sources[0].name


@dataclass(frozen=True)
class Vector:
    """A tensor that is neither a norm's nor a matrix; kept in float32."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Weights:
    """What a part of a block is made of.  norms, vectors: by their place in the computation."""

    linears: tuple[Linear, ...] = ()
    norms: Mapping[str, Norm] = field(default_factory=dict)
    vectors: Mapping[str, Vector] = field(default_factory=dict)

    def __add__(self, other: Weights) -> Weights:
        return Weights(self.linears + other.linears, {**self.norms, **other.norms}, {**self.vectors, **other.vectors})


@dataclass(frozen=True)
class KvLayer:
    """The cache of a block: elements of each position's keys and values."""

    kv_heads: int
    key_dim: int
    value_dim: int

    @property
    def floats(self) -> int:
        return self.kv_heads * (self.key_dim + self.value_dim)


@dataclass(frozen=True)
class Attention:
    """Causal attention, grouped queries (Vaswani et al., arXiv 1706.03762; Ainslie et al., arXiv 2305.13245).

    scale: of the scores.  window: positions that a query sees, itself included; None is all.  rope: None for no
    positions; with fewer pairs than half a head only the first 2 · pairs elements turn.  rope_interleaved: pairs are
    elements 2i and 2i + 1, not halves.  softcap: scores become softcap · tanh(score / softcap); 0 is off.  sinks: one
    learnt logit a head that takes part in the softmax and gives nothing.  query_key_norm: of each head, or of all heads
    at once; before the rotation.  values_are_keys: the values are the keys as projected (no weight of their own).
    output_gate: the result is multiplied by sigmoid(output_gate(input)).  shares_kv_of: number of the block whose
    keys and values are read; no k and v of its own then.  query_growth: (β, n): queries at position p are multiplied by
    1 + β · log(1 + ⌊p / n⌋).
    Norm places: query, key, value.  Vectors: sinks (heads,).  Linears: q, k, v, o, output_gate.
    """

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    scale: float
    window: int | None = None
    rope: Rope | None = None
    rope_interleaved: bool = False
    softcap: float = 0.0
    sinks: bool = False
    query_key_norm: Literal["head", "all"] | None = None
    values_are_keys: bool = False
    output_gate: bool = False
    shares_kv_of: int | None = None
    query_growth: tuple[float, int] | None = None

    @property
    def kv_layer(self) -> KvLayer | None:
        return None if self.shares_kv_of is not None else KvLayer(self.kv_heads, self.head_dim, self.value_dim)

    @property
    def width(self) -> int:
        """Floats of a token's queries, keys and values, and of what is read from them."""
        queries = self.heads * (self.head_dim + self.value_dim) * (2 if self.output_gate else 1)
        return queries + self.kv_heads * (self.head_dim + self.value_dim)


@dataclass(frozen=True)
class LatentAttention:
    """Keys and values of all heads from one small latent a position (DeepSeek-V2, arXiv 2405.04434).

    A head's query and key are ``nope_dim`` elements without a position and ``rope_dim`` that turn; the turning part of
    the key is the same for all heads. The cache holds the normed latent and the turned part: keys are
    (latent, turned), values the latent, when k_b and v_b are multiplied into queries and result. q_rank: None if
    queries come straight from the input (q), else from a latent of their own (q_a, q_b).
    Norm places: q_latent, kv_latent.  Linears: q or q_a and q_b, kv_a, k_rope, k_b, v_b, o.
    """

    heads: int
    q_rank: int | None
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    scale: float
    rope: Rope
    rope_interleaved: bool
    window: None = None

    @property
    def kv_layer(self) -> KvLayer:
        return KvLayer(1, self.kv_rank + self.rope_dim, self.kv_rank)

    @property
    def width(self) -> int:
        """Floats of a token's queries (as made, and in the latent), of the latents, and of what is read."""
        queries = self.heads * (self.nope_dim + 2 * self.rope_dim + 2 * self.kv_rank + self.value_dim)
        return queries + (self.q_rank or 0) + 2 * self.kv_rank + self.rope_dim


@dataclass(frozen=True)
class DeltaNet:
    """Linear attention with a state (Gated DeltaNet; Yang, Kautz and Hatamizadeh, arXiv 2412.06464).

    (q, k, v) pass a causal convolution of each channel over ``kernel`` positions and silu; each head keeps a state
    S (key_dim, value_dim): S ← α S, then S ← S + k ⊗ β (v − kᵀ S), and gives qᵀ S, with α = exp(−exp(decay) ·
    softplus(a + step)), β = sigmoid(b), and q and k of length one, q times key_dim^−½. The result is normed a head and
    multiplied by silu(z). A key head serves value_heads / key_heads heads.
    Norm places: state.  Vectors: decay, step (value_heads,), convolution (channels, 1, kernel).
    Linears: qkv (all q heads, then k, then v), z, b, a, o.
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    kernel: int
    window: None = None
    rope: None = None

    @property
    def kv_layer(self) -> None:
        return None

    @property
    def channels(self) -> int:
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim

    @property
    def state_floats(self) -> int:
        """Of one sequence: the heads' states and the last inputs of the convolution."""
        return self.value_heads * self.key_dim * self.value_dim + self.channels * (self.kernel - 1)

    @property
    def width(self) -> int:
        return 2 * self.channels + 2 * self.value_heads * (self.value_dim + 1)


Mixer: TypeAlias = Attention | LatentAttention | DeltaNet


@dataclass(frozen=True)
class Mlp:
    """down(activation(gate(x)) · up(x)), or down(activation(up(x))) if it is not gated.

    Linears: gate (if gated), up, down.
    """

    inner: int
    activation: Activation
    gated: bool = True

    @property
    def width(self) -> int:
        return (3 if self.gated else 2) * self.inner


@dataclass(frozen=True)
class Experts:
    """A mixture of experts (Shazeer et al., arXiv 1701.06538): ``top_k`` of ``count`` gated MLPs work on a token.

    scoring: what makes scores of the router's logits; "chosen" is a softmax over the chosen ones alone.  normalized:
    chosen scores are divided by their sum.  scale: a factor on them.  groups, top_groups: only experts of the best
    top_groups of equal groups may be chosen; group_score: a group is as good as its best expert ("max") or its two
    best ("pair").  correction_bias: a vector that is added to scores for choosing, not for weighing.
    activation "clamped" is gpt-oss's: gate = min(gate, limit), up = clip(up, ±limit), (up + 1) · gate · sigmoid(alpha
    · gate).  shared_inner: width of an MLP that works on all tokens beside the experts; 0 is none.  shared_gate: its
    result is multiplied by sigmoid(shared_gate(x)).
    Norm places, for families that norm the parts apart (Gemma 4): router, experts_in (both on the block's stream),
    shared_out, experts_out.  Vectors: correction (count,), expert_scale (count,): a factor on each expert's score.
    Linears: router, experts.N.{gate, up, down}, shared.{gate, up, down}, shared_gate.
    """

    count: int
    top_k: int
    inner: int
    activation: Activation
    scoring: Literal["softmax", "sigmoid", "chosen"] = "softmax"
    normalized: bool = True
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1
    group_score: Literal["max", "pair"] = "max"
    correction_bias: bool = False
    limit: float = math.inf
    alpha: float = 1.0
    shared_inner: int = 0
    shared_gate: bool = False

    @property
    def width(self) -> int:
        return 3 * (self.top_k * self.inner + self.shared_inner) + 2 * self.count


@dataclass(frozen=True)
class Block:
    """A decoder layer: x ← x + r · out(mixer(in(x))), x ← x + r · out(mlp(in(x))), with r = residual_scale.

    Norm places: attention_in, attention_out, mlp_in, mlp_out; one that is missing does nothing.  parallel: both read
    the block's input, and one sum is made (GPT-NeoX).  per_layer_inner: Gemma 4's second embedding of the token comes
    in after the MLP: x ← x + norm(up(gelu_tanh(down(x)) · embedding)), norm place per_layer, linears
    per_layer.down, per_layer.up; 0 is off.  Vectors: layer_scale (1,): a factor on the block's result.
    """

    mixer: Mixer
    mlp: Mlp | Experts
    weights: Weights
    parallel: bool = False
    residual_scale: float = 1.0
    per_layer_inner: int = 0

    @property
    def linears(self) -> tuple[Linear, ...]:
        """In the order in which they compute."""
        return self.weights.linears

    @property
    def norms(self) -> Mapping[str, Norm]:
        return self.weights.norms

    @property
    def vectors(self) -> Mapping[str, Vector]:
        return self.weights.vectors


@dataclass(frozen=True)
class PerLayerEmbedding:
    """Gemma 4's second embedding: a token's row (layers · inner) of a table of its own, times ``scale``, and the main
    embedding through ``projection`` (layers · inner, hidden), times hidden^−½ and normed a layer; their sum over √2.

    Module names are relative to `ModelConfig.stem`.
    """

    inner: int
    vocab_size: int
    table: str
    projection: str
    norm: Norm
    scale: float


@dataclass(frozen=True)
class ModelConfig:
    """A decoder.

    stem: what all names but the head's begin with.  embedding_scale: a factor on embeddings.  logit_scale: one on
    logits; logit_softcap: then softcap · tanh(logit / softcap), 0 is off.  eos_token_ids: any of them ends a text.
    Sizes are in elements, ``max_position`` in tokens.
    """

    family: str
    vocab_size: int
    hidden: int
    max_position: int
    blocks: tuple[Block, ...]
    final_norm: Norm
    tied_embeddings: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float = 0.0
    per_layer: PerLayerEmbedding | None = None
    stem: str = "model."
    embedding_name: str = "embed_tokens"
    head_name: str = "lm_head"

    @property
    def layers(self) -> int:
        return len(self.blocks)

    @property
    def embedding(self) -> str:
        """The module of the embedding."""
        return f"{self.stem}{self.embedding_name}"

    @property
    def head(self) -> str:
        """The module that makes logits: the embedding where they are tied."""
        return self.embedding if self.tied_embeddings else self.head_name

    def block(self, index: int) -> str:
        """What the names of a block's tensors begin with, before a dot."""
        return f"{self.stem}layers.{index}"

    @property
    def kv_layers(self) -> tuple[KvLayer | None, ...]:
        """The cache of each block; None for those that keep none."""
        return tuple(block.mixer.kv_layer for block in self.blocks)

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of one position in all blocks, in float32."""
        return 4 * sum(layer.floats for layer in self.kv_layers if layer is not None)

    @property
    def state_bytes(self) -> int:
        """What blocks keep of one sequence besides its cache, in float32."""
        return 4 * sum(block.mixer.state_floats for block in self.blocks if isinstance(block.mixer, DeltaNet))

    @property
    def floats_per_token(self) -> int:
        """The most that a token takes while a block computes it: its stream, and what the block makes of it."""
        return 4 * self.hidden + max(3 * block.mixer.width + block.mlp.width for block in self.blocks)

    @property
    def parameters(self) -> int:
        """Numbers in all tensors that the computation reads."""
        count = self.vocab_size * self.hidden * (1 if self.tied_embeddings else 2) + _size_of(self.final_norm)
        if (extra := self.per_layer) is not None:
            count += self.layers * extra.inner * (extra.vocab_size + self.hidden) + _size_of(extra.norm)
        for block in self.blocks:
            count += sum(math.prod(each.shape) + each.bias * each.shape[0] for each in block.linears)
            count += sum(map(_size_of, block.norms.values()))
            count += sum(math.prod(vector.shape) for vector in block.vectors.values())
        return count

    def for_length(self, length: int) -> ModelConfig:
        """The same for sequences of up to ``length`` tokens: rotary positions that depend on it are settled."""
        blocks = []
        for block in self.blocks:
            mixer = block.mixer
            if not isinstance(mixer, DeltaNet) and mixer.rope is not None:
                mixer = replace(mixer, rope=mixer.rope.for_length(length))
            blocks.append(replace(block, mixer=mixer))
        return replace(self, blocks=tuple(blocks))


def _size_of(norm: Norm) -> int:
    return norm.size * ((norm.weight is not None) + (norm.bias is not None))
