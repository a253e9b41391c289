"""How fast a model is on this machine, measured through the engine, as a service would use it."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from .. import hardware
from ..errors import BadInput, OutOfBudget, PenjingError
from ..models import Model
from .blocks import BLOCK, blocks_for
from .engine import Engine
from .messages import Event, Load, Ready, Request, SamplingParams
from .process import load

PREFILL_TOKENS = 512
DECODE_PROMPT = 16
STREAMS = (1, 8)


@dataclass(frozen=True)
class Spread:
    """The median of some runs, with the least and the most."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Benchmark:
    """Speeds in tokens per second.

    decode: number of streams → speed of all of them together.  bandwidth_gbps: measured after each run, for it swings.
    bandwidth_fraction: what one stream reads a second (weights, and its cache at its mean length) over the bandwidth of
    its own run.  prefill_tokens: length of the prompt, 512 or as much as the model's window takes.
    decode_at_context: tokens that one stream has before it → its speed.  peak_rss_bytes: of this process.
    from_cache: did it load packed weights from their file?
    """

    prefill: Spread
    decode: dict[int, Spread]
    decode_at_context: dict[int, Spread]
    kv_cache_dtype: str
    prefill_tokens: int
    decode_tokens: int
    runs: int
    threads: int
    weights_bytes: int
    bandwidth_gbps: float
    bandwidth_fraction: float
    peak_rss_bytes: int
    load_seconds: float
    from_cache: bool

    def to_dict(self) -> dict[str, Any]:
        """As `penjing bench --json` prints it."""
        return {
            **self._speeds(),
            "weights_bytes": self.weights_bytes,
            "bandwidth_fraction": round(self.bandwidth_fraction, 4),
            "peak_rss_bytes": self.peak_rss_bytes,
            "load_seconds": round(self.load_seconds, 3),
            "loaded_from_cache": self.from_cache,
            "spread": {
                "prefill": [round(self.prefill.low, 2), round(self.prefill.high, 2)],
                "decode": {
                    str(streams): [round(each.low, 2), round(each.high, 2)] for streams, each in self.decode.items()
                },
            },
            "prefill_tokens": self.prefill_tokens,
            "decode_tokens": self.decode_tokens,
            "runs": self.runs,
            "threads": self.threads,
            "kv_cache_dtype": self.kv_cache_dtype,
            "bandwidth_gbps": self.bandwidth_gbps,
        }

    def _speeds(self) -> dict[str, Any]:
        def medians(spreads: dict[int, Spread]) -> dict[str, float]:
            return {str(number): round(each.median, 2) for number, each in spreads.items()}

        speeds: dict[str, Any] = {
            "prefill_tokens_per_second": round(self.prefill.median, 2),
            "decode_tokens_per_second": medians(self.decode),
        }
        return speeds | ({"decode_at_context": medians(self.decode_at_context)} if self.decode_at_context else {})


def bench(
    model: str | Path,
    *,
    threads: int | None = None,
    runs: int = 5,
    decode_tokens: int = 64,
    contexts: Sequence[int] = (),
    kv_cache_dtype: str = "auto",
    memory_budget: int | None = None,
    weight_cache: bool = False,
    progress: Callable[[float, float], None] = lambda done, total: None,
) -> Benchmark:
    """Measure prefill of a 512-token prompt and decode of 1 and of 8 streams: the median of ``runs``, greedy.

    threads: all cores by default.  decode_tokens: written in each stream, after a prompt of 16.
    contexts: lengths of prompts after which one stream is measured as well.  kv_cache_dtype, memory_budget,
    weight_cache: as for `serve`.  Raises BadInput if the model's window is too short for that, OutOfBudget
    if memory is, and PenjingError with the reason when a stream fails.
    """
    if runs < 1 or decode_tokens < 2 or min(contexts, default=1) < 1:
        raise BadInput(
            f"runs={runs}, decode_tokens={decode_tokens}, contexts={list(contexts)}: "
            "at least one run of two tokens after one is needed"
        )
    threads = threads or hardware.cores()
    settings = Load(
        folder=str(model),
        max_num_seqs=max(STREAMS),
        max_num_batched_tokens=PREFILL_TOKENS,
        threads=threads,
        kv_cache_dtype=kv_cache_dtype,
        memory_budget=memory_budget,
        weight_cache=weight_cache,
    )
    engine, ready = load(settings)
    _check_room(str(model), engine, ready, max([DECODE_PROMPT, *contexts]), decode_tokens)
    prompt_length = min(PREFILL_TOKENS, engine.limits.max_model_len - 1)
    done = itertools.count(1)
    total = runs * (1 + len(STREAMS) + len(contexts)) + 1

    def tick() -> None:
        progress(next(done), total)

    _decode(engine, 1, 2)  # pages touched, threads started
    tick()
    rounds = [_round(engine, run, prompt_length, decode_tokens, contexts, tick) for run in range(runs)]
    read = bytes_read_per_token(cast(Model, engine.model), ready.kv_cache_dtype, DECODE_PROMPT + decode_tokens / 2)
    return Benchmark(
        prefill=Spread.of([each.prefill for each in rounds]),
        decode={streams: Spread.of([each.decode[streams] for each in rounds]) for streams in STREAMS},
        decode_at_context={length: Spread.of([each.at_context[length] for each in rounds]) for length in contexts},
        kv_cache_dtype=ready.kv_cache_dtype,
        prefill_tokens=prompt_length,
        decode_tokens=decode_tokens,
        runs=runs,
        threads=threads,
        weights_bytes=ready.weights_bytes,
        bandwidth_gbps=statistics.median(each.bandwidth_gbps for each in rounds),
        bandwidth_fraction=statistics.median(read * each.decode[1] / (each.bandwidth_gbps * 1e9) for each in rounds),
        peak_rss_bytes=rounds[0].peak_rss_bytes,
        load_seconds=ready.load_seconds,
        from_cache=ready.from_cache,
    )


@dataclass(frozen=True)
class _Round:
    """One measurement of everything, in tokens per second: a slow moment of the machine meets all of it.

    peak_rss_bytes: in the first round before the bandwidth takes its own buffer.
    """

    prefill: float
    decode: dict[int, float]
    at_context: dict[int, float]
    peak_rss_bytes: int
    bandwidth_gbps: float


def _round(
    engine: Engine, run: int, prompt: int, tokens: int, contexts: Sequence[int], tick: Callable[[], None]
) -> _Round:
    """prompt: its length for prefill.  tokens: written in each stream.  tick: is called after each speed."""

    def ticked(speed: float) -> float:
        tick()
        return speed

    return _Round(  # in this order
        prefill=ticked(_prefill(engine, prompt, run)),
        at_context={length: ticked(_decode(engine, 1, tokens, prompt=length)) for length in contexts},
        decode={streams: ticked(_decode(engine, streams, tokens)) for streams in reversed(STREAMS)},
        peak_rss_bytes=hardware.peak_memory_bytes(),
        bandwidth_gbps=hardware.bandwidth_gbps(),
    )


def _check_room(model: str, engine: Engine, ready: Ready, longest: int, decode_tokens: int) -> None:
    window, room = engine.limits.max_model_len, engine.limits.blocks
    if window < longest + decode_tokens:
        raise BadInput(f"{model}: {longest} + {decode_tokens} tokens do not fit into its window of {window}")
    streams, length = max(STREAMS), DECODE_PROMPT + decode_tokens
    if (blocks := streams * blocks_for(length)) > room:
        raise OutOfBudget(
            f"{model}: {streams} streams of {length} tokens take {blocks} blocks of cache ({BLOCK} positions, "
            f"{ready.block_bytes:,} bytes each); the memory budget has room for {room}"
        )


def _prefill(engine: Engine, length: int, run: int) -> float:
    """Tokens per second from the request to its first token; no run finds the prompt of another in the cache."""
    params = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)
    request = Request("prefill", _random_tokens(engine, length), params, cache_salt=f"run {run}")
    start = time.perf_counter()
    for event in engine.run(request):
        _check(event)
    return length / (time.perf_counter() - start)


def _decode(engine: Engine, streams: int, tokens: int, prompt: int = DECODE_PROMPT) -> float:
    """Tokens per second of all streams, from the moment when each has its first.

    A long prompt is in the cache from the second run on, so that not much of the time goes into reading it again.
    """
    params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
    for stream in range(streams):
        engine.add(Request(f"decode-{stream}", _random_tokens(engine, prompt, seed=stream), params))
    written = 0
    while written < streams:
        written += _step(engine)
    start, already = time.perf_counter(), written
    while engine.has_work:
        written += _step(engine)
    return (written - already) / (time.perf_counter() - start)


def _step(engine: Engine) -> int:
    """Tokens that a step wrote."""
    events = engine.step()
    for event in events:
        _check(event)
    return sum(len(event.tokens) for event in events)


def _check(event: Event) -> None:
    """A stream that fails has no speed; raises PenjingError."""
    if event.error is not None:
        raise PenjingError(f"{event.request_id}: {event.error}")


def _random_tokens(engine: Engine, count: int, seed: int = 0) -> list[int]:
    random = np.random.default_rng(seed)
    return [int(token) for token in random.integers(0, engine.model.config.vocab_size, count)]


def bytes_read_per_token(model: Model, kv_type: str, length: float) -> float:
    """Bytes that one token of one stream takes from memory, with ``length`` tokens before it: weights, keys, values."""
    return model.read_bytes + length * model.block_bytes(kv_type) / BLOCK
