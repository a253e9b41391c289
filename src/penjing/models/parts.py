"""The parts that families are put together from: what attention, an MLP and experts are made of, and a whole decoder.

A family's file describes each block with these; the names are Hugging Face's, and ``sources`` says where a family
stores a weight under another one, or together with others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

from .config import (
    Attention,
    Block,
    DeltaNet,
    Experts,
    LatentAttention,
    Linear,
    Mixer,
    Mlp,
    ModelConfig,
    Norm,
    Run,
    Source,
    Vector,
    Weights,
)
from .reader import Reader

# Name of a module and its size → its norm; a family has one kind.
MakeNorm: TypeAlias = Callable[[str, int], Norm]
# Role → where the weight may be, in place of the usual name.
Sources: TypeAlias = Mapping[str, tuple[Source, ...]]


def rms(eps: float, offset: float = 0.0) -> MakeNorm:
    """Zhang and Sennrich, arXiv 1910.07467; offset 1 where weights are stored around zero."""
    return lambda name, size: Norm(f"{name}.weight", size, eps, offset=offset)


def layer_norm(eps: float) -> MakeNorm:
    """With weight and bias."""
    return lambda name, size: Norm(f"{name}.weight", size, eps, "layer", bias=f"{name}.bias")


def module(name: str) -> tuple[Source, ...]:
    """A weight that is a module of its own."""
    return (Source(name),)


def part(name: str, total: int, *runs: Run) -> tuple[Source, ...]:
    """A weight that is some rows of a module with ``total`` of them."""
    return (Source(name, runs, total),)


def split(name: str, sizes: Mapping[str, int]) -> dict[str, tuple[Source, ...]]:
    """A module in which weights lie one after another: role → rows."""
    total, start, found = sum(sizes.values()), 0, {}
    for role, size in sizes.items():
        found[role] = part(name, total, Run(start, size))
        start += size
    return found


def grouped_attention(
    hidden: int,
    attention: Attention,
    norm: MakeNorm,
    *,
    at: str = "self_attn",
    qkv_bias: bool = False,
    output_bias: bool = False,
    sources: Sources | None = None,
) -> Weights:
    """Of grouped-query attention."""
    queries, keys = attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim
    values, mixed = attention.kv_heads * attention.value_dim, attention.heads * attention.value_dim
    shapes = [("q", "queries", queries)]
    norms, vectors = {}, {}
    if attention.shares_kv_of is None:
        shapes += [("k", "keys", keys)]
        if not attention.values_are_keys:
            shapes += [("v", "values", values)]
    if attention.output_gate:
        shapes += [("output_gate", "attention_output", mixed)]
    if attention.query_key_norm is not None:
        whole = attention.query_key_norm == "all"
        norms["query"] = norm(f"{at}.q_norm", queries if whole else attention.head_dim)
        if attention.shares_kv_of is None:
            norms["key"] = norm(f"{at}.k_norm", keys if whole else attention.head_dim)
    if attention.sinks:
        vectors["sinks"] = Vector(f"{at}.sinks", (attention.heads,))
    stored = {role: module(f"{at}.{role}_proj") for role in "qkvo"} | dict(sources or {})
    linears = [
        Linear(role, "attention_input", makes, (size, hidden), qkv_bias, stored[role]) for role, makes, size in shapes
    ]
    linears.append(Linear("o", "attention_output", "stream", (hidden, mixed), output_bias, stored["o"]))
    return Weights(tuple(linears), norms, vectors)


def latent_attention(
    hidden: int, attention: LatentAttention, norm: MakeNorm, *, at: str = "self_attn", bias: bool = False
) -> Weights:
    """Of multi-head latent attention; kv_b holds each head's rows of k_b, then of v_b."""
    heads, rank, value_dim = attention.heads, attention.kv_rank, attention.value_dim
    queries = heads * (attention.nope_dim + attention.rope_dim)
    each = attention.nope_dim + value_dim
    latent = split(f"{at}.kv_a_proj_with_mqa", {"kv_a": rank, "k_rope": attention.rope_dim})
    k_b = part(f"{at}.kv_b_proj", heads * each, Run(0, attention.nope_dim, each, heads))
    v_b = part(f"{at}.kv_b_proj", heads * each, Run(attention.nope_dim, value_dim, each, heads))
    norms = {"kv_latent": norm(f"{at}.kv_a_layernorm", rank)}
    if attention.q_rank is None:
        linears = [Linear("q", "attention_input", "queries", (queries, hidden), False, module(f"{at}.q_proj"))]
    else:
        q_rank = attention.q_rank
        norms["q_latent"] = norm(f"{at}.q_a_layernorm", q_rank)
        linears = [
            Linear("q_a", "attention_input", "q_latent", (q_rank, hidden), bias, module(f"{at}.q_a_proj")),
            Linear("q_b", "q_latent", "queries", (queries, q_rank), False, module(f"{at}.q_b_proj")),
        ]
    linears += [
        Linear("kv_a", "attention_input", "kv_latent", (rank, hidden), bias, latent["kv_a"]),
        Linear("k_rope", "attention_input", "keys", (attention.rope_dim, hidden), bias, latent["k_rope"]),
        Linear("k_b", "kv_latent", "keys", (heads * attention.nope_dim, rank), False, k_b),
        Linear("v_b", "kv_latent", "attention_output", (heads * value_dim, rank), False, v_b),
        Linear("o", "attention_output", "stream", (hidden, heads * value_dim), bias, module(f"{at}.o_proj")),
    ]
    return Weights(tuple(linears), norms)


def delta_net(hidden: int, net: DeltaNet, norm: Norm, sources: Sources, *, at: str = "linear_attn") -> Weights:
    """Of a gated delta net; ``norm`` is that of its result, ``sources`` has qkv, z, b and a."""
    values = net.value_heads * net.value_dim
    sizes = {"qkv": net.channels, "z": values, "b": net.value_heads, "a": net.value_heads}
    makes = {"qkv": "delta_input", "z": "attention_output", "b": "delta_rate", "a": "delta_decay"}
    linears = [
        Linear(role, "attention_input", makes[role], (size, hidden), False, sources[role])
        for role, size in sizes.items()
    ]
    linears.append(Linear("o", "attention_output", "stream", (hidden, values), False, module(f"{at}.out_proj")))
    vectors = {
        "decay": Vector(f"{at}.A_log", (net.value_heads,)),
        "step": Vector(f"{at}.dt_bias", (net.value_heads,)),
        "convolution": Vector(f"{at}.conv1d.weight", (net.channels, 1, net.kernel)),
    }
    return Weights(tuple(linears), {"state": norm}, vectors)


def mlp(
    hidden: int,
    inner: int,
    *,
    at: str = "mlp",
    role: str = "",
    reads: str = "mlp_input",
    gated: bool = True,
    bias: bool = False,
    sources: Sources | None = None,
) -> Weights:
    """Of an MLP; ``role`` goes before those of its weights, and ``sources`` are named without it."""
    makes = f"{role}mlp_inner"
    stored = {name: module(f"{at}.{name}_proj") for name in ("gate", "up", "down")} | dict(sources or {})
    return Weights(
        tuple(
            Linear(f"{role}{name}", read, made, shape, bias, stored[name])
            for name, read, made, shape in (
                ("gate", reads, makes, (inner, hidden)),
                ("up", reads, makes, (inner, hidden)),
                ("down", makes, "stream", (hidden, inner)),
            )
            if gated or name != "gate"
        )
    )


def mixture(
    hidden: int,
    experts: Experts,
    *,
    at: str = "mlp",
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    shared: str = "shared_experts",
) -> Weights:
    """Of a mixture of experts whose matrices have no biases.

    names: of an expert's gate, up and down.  shared: the module of the MLP beside them.  Experts are read one by one,
    or from tensors of all of them: gate_up_proj and down_proj.
    """
    router = tuple(dict.fromkeys((Source(f"{at}.gate"), Source("mlp.gate"))))
    made = Weights((Linear("router", "mlp_input", "scores", (experts.count, hidden), False, router),))
    if experts.correction_bias:
        made += Weights(vectors={"correction": Vector(f"{at}.gate.e_score_correction_bias", (experts.count,))})
    if experts.shared_inner:
        made += mlp(hidden, experts.shared_inner, at=f"{at}.{shared}", role="shared.")
    if experts.shared_gate:
        gate = module(f"{at}.{shared}_gate")
        made += Weights((Linear("shared_gate", "mlp_input", "scores", (1, hidden), False, gate),))
    linears: list[Linear] = []
    for number in range(experts.count):
        together = fused_expert("mlp.experts", experts.inner, number)
        sources = {
            role: (Source(f"{at}.experts.{number}.{name}"), *together[role])
            for role, name in zip(("gate", "up", "down"), names, strict=True)
        }
        linears += mlp(hidden, experts.inner, role=f"experts.{number}.", sources=sources).linears
    return made + Weights(tuple(linears))


def fused_expert(at: str, inner: int, number: int) -> dict[str, tuple[Source, ...]]:
    """An expert in tensors of all: gate_up_proj (experts, 2 · inner, in) and down_proj (experts, out, inner)."""
    both = f"{at}.gate_up_proj"
    return {
        "gate": (Source(both, (Run(0, inner),), 2 * inner, number),),
        "up": (Source(both, (Run(inner, inner),), 2 * inner, number),),
        "down": (Source(f"{at}.down_proj", None, 0, number),),
    }


def norms_at(**names: str) -> Callable[[int, MakeNorm], Weights]:
    """The norms of a block, by place: the name of each."""
    return lambda hidden, norm: Weights(norms={place: norm(name, hidden) for place, name in names.items()})


# The usual two norms of a block, each before its part.
pre_norm = norms_at(attention_in="input_layernorm", mlp_in="post_attention_layernorm")
# Gemma's four: before and after each part.
sandwich = norms_at(
    attention_in="input_layernorm",
    attention_out="post_attention_layernorm",
    mlp_in="pre_feedforward_layernorm",
    mlp_out="post_feedforward_layernorm",
)


def decoder(read: Reader, blocks: Iterable[Block], final_norm: Norm, *, tied: bool = False, **more: Any) -> ModelConfig:
    """The model of these blocks; ``more`` are fields of `ModelConfig` that config.json does not hold as they are.

    tied: whether the family's embeddings are, where config.json does not say.

    Raises BadCheckpoint for missing and wrong values, Unsupported for what is no causal language model.
    """
    read.causal()
    bos = read.tokens("bos_token_id")
    fields: dict[str, Any] = {
        "family": read.values["model_type"],
        "vocab_size": read.integer("vocab_size"),
        "hidden": read.integer("hidden_size"),
        "max_position": read.integer("max_position_embeddings"),
        "blocks": tuple(blocks),
        "final_norm": final_norm,
        "tied_embeddings": read.flag("tie_word_embeddings", tied),
        "bos_token_id": bos[0] if bos else None,
        "eos_token_ids": read.tokens("eos_token_id"),
    }
    return ModelConfig(**fields | more)


def block(mixer: Mixer, mlp: Mlp | Experts, *weights: Weights, **more: Any) -> Block:
    """A block of these parts' weights."""
    return Block(mixer, mlp, sum(weights, Weights()), **more)
