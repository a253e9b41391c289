"""What goes into the engine and comes out of it: plain data, the same in one process and between two.

The ranges are part of the types, so that whoever decodes a message (the server from JSON, the engine from its pipe)
checks them in the same way.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

import msgspec
from msgspec import Meta, Struct

from ..models.step import Logprobs

FinishReason: TypeAlias = Literal["stop", "length", "abort", "error"]
Count: TypeAlias = Annotated[int, Meta(ge=0, le=2**31 - 1)]
TokenId: TypeAlias = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Temperature: TypeAlias = Annotated[float, Meta(ge=0, le=2)]
TopK: TypeAlias = Annotated[int, Meta(ge=-1, le=2**31 - 1)]
Fraction: TypeAlias = Annotated[float, Meta(ge=0, le=1)]
Penalty: TypeAlias = Annotated[float, Meta(ge=-2, le=2)]
RepetitionPenalty: TypeAlias = Annotated[float, Meta(gt=0, le=100)]
Bias: TypeAlias = Annotated[float, Meta(ge=-100, le=100)]
Seed: TypeAlias = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Priority: TypeAlias = Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)]
Alternatives: TypeAlias = Annotated[int, Meta(ge=0, le=20)]


class SamplingParams(Struct, frozen=True, kw_only=True):
    """How the next token is chosen, and when to stop: bias, min_tokens and penalties, what a grammar allows,
    temperature, min_p, top_k, top_p, in this order, and one draw.

    min_p keeps tokens at least that fraction as likely as the likeliest; top_k the k likeliest of those; top_p the
    smallest set of the likeliest whose probabilities, among what is left, sum to top_p or more. Among equals the lower
    id counts as likelier. At least one token is left.
    temperature: 0 is greedy.  top_k: 0 or −1 for all.  repetition_penalty: on tokens of prompt and output (Keskar et
    al., arXiv 1909.05858); presence and frequency: on those of the output.  seed, choice: the result of a request
    depends on these two and on nothing else in its batch; ``choice`` counts those of one request.
    min_tokens: no end before so many.  stop_token_ids: end a text as the model's own end token does, also with
    ignore_eos.  logprobs: None for none, otherwise how many alternatives beside the chosen token;
    prompt_logprobs: the same for the prompt.  All log-probabilities are the model's own, before any of the above.
    """

    max_tokens: Count = 16
    temperature: Temperature = 1.0
    top_k: TopK = 0
    top_p: Fraction = 1.0
    min_p: Fraction = 0.0
    repetition_penalty: RepetitionPenalty = 1.0
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    logit_bias: dict[TokenId, Bias] = {}
    seed: Seed = 0
    choice: Count = 0
    min_tokens: Count = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[TokenId, ...] = ()
    logprobs: Alternatives | None = None
    prompt_logprobs: Alternatives | None = None


class Request(Struct, frozen=True):
    """One sequence to continue.

    priority: the lower the earlier, where the engine's policy asks for it.  cache_salt: only requests of the same salt
    share what is cached of their prompts.
    """

    id: str
    prompt: list[TokenId]
    params: SamplingParams
    priority: Priority = 0
    cache_salt: str = ""


class Timings(Struct, frozen=True, array_like=True):
    """Seconds that a sequence waited, read its prompt, and wrote; by the engine's own clock."""

    queue: float
    prefill: float
    decode: float


class Event(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a step did for one request; the last one has a finish_reason.

    tokens: new ones. The token that ends the text (end token, stop_token_ids) is among them, as the last.
    logprobs: one a token, if asked for.  prompt_logprobs: one a prompt token from the second on, when the prompt is
    read.  cached_tokens: with the first token, how much of the prompt was found in the cache.  error: with
    finish_reason "error", what happened.
    """

    request_id: str
    tokens: list[int] = []
    logprobs: list[Logprobs] = []
    prompt_logprobs: list[Logprobs] = []
    cached_tokens: int = 0
    finish_reason: FinishReason | None = None
    error: str | None = None
    timings: Timings | None = None


class Stats(Struct, frozen=True, array_like=True):
    """Sequences and blocks of cache, now; and counts since the start.

    blocks_used: held by sequences that compute.  prefix_queries, prefix_hits: prompt tokens looked up in the prefix
    cache, and found.  drafts: times that tokens were guessed.  guessed, accepted: tokens.
    """

    running: int = 0
    waiting: int = 0
    blocks_used: int = 0
    blocks: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    preemptions: int = 0
    drafts: int = 0
    guessed: int = 0
    accepted: int = 0


class Load(Struct, frozen=True, tag=True, kw_only=True):
    """To the engine's process, first of all: which model, within what. None: as much as fits, or what suits the model.

    kv_cache_dtype: of `kernels.KV_TYPES`, or "auto".  speculative: "prompt", or the folder of a draft.
    weight_cache: keep packed weights in a file, see docs/cache.md.
    """

    folder: str
    memory_budget: int | None = None
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    kv_cache_dtype: str = "auto"
    enable_prefix_caching: bool | None = None
    scheduling_policy: Literal["fcfs", "priority"] = "fcfs"
    speculative: str | None = None
    num_speculative_tokens: int = 5
    threads: int | None = None
    weight_cache: bool = False


class Add(Struct, frozen=True, tag=True):
    request: Request


class Abort(Struct, frozen=True, tag=True):
    request_id: str


class Stop(Struct, frozen=True, tag=True):
    pass


class Ready(Struct, frozen=True, tag=True, kw_only=True):
    """From the engine's process: the model is loaded; the memory as it was counted.

    from_cache: were its packed weights in their file?
    """

    max_model_len: int
    weights_bytes: int
    blocks: int
    block_bytes: int
    kv_cache_dtype: str
    memory_budget: int
    load_seconds: float
    from_cache: bool


class Progress(Struct, frozen=True, tag=True):
    """After every step."""

    events: list[Event]
    stats: Stats


class Failed(Struct, frozen=True, tag=True):
    """The model could not be loaded."""

    message: str
    exit_code: int


Command: TypeAlias = Load | Add | Abort | Stop
Report: TypeAlias = Ready | Progress | Failed

encoder = msgspec.msgpack.Encoder()
command_decoder: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)
report_decoder: msgspec.msgpack.Decoder[Report] = msgspec.msgpack.Decoder(Report)
