"""Penjing through `engine.process.load`, `Engine.add` and `Engine.step`, as its service uses them.

python penjing_engine.py                 answers the commands of protocol.py, and one more:

{"do": "prefix", "tokens": 1000, "seed": 0}   → {"cold": …, "seconds": …}   to the first token of a prompt, and of
                                                the same prompt again

Its answer to "decode" has also "bandwidth": bytes a second that memory gave just before and just after, the mean.
"""

from __future__ import annotations

import itertools
import time
from typing import Any

import protocol

from penjing import __version__, hardware
from penjing.engine.bench import bytes_read_per_token
from penjing.engine.messages import Load, Request, SamplingParams
from penjing.engine.process import load

BATCH = 512
LENGTH = 1


class Penjing:
    def load(self, model: str, threads: int, kind: str, cache: str | None = None) -> dict[str, Any]:
        chosen = {"kv_cache_dtype": cache} if cache else {}
        start = time.perf_counter()
        self.engine, ready = load(
            Load(
                folder=model, max_num_seqs=8, max_num_batched_tokens=BATCH, threads=threads, weight_cache=True, **chosen
            )
        )
        seconds = time.perf_counter() - start
        self._ids = itertools.count()
        return {
            "seconds": seconds,
            "version": f"Penjing {__version__}",
            "bytes": bytes_read_per_token(self.engine.model, ready.kv_cache_dtype, LENGTH),
            "weights_bytes": ready.weights_bytes,
            "cache": ready.kv_cache_dtype,
        } | WORDS[kind]

    def prefill(self, tokens: int, seed: int) -> dict[str, Any]:
        return {"seconds": self._run(1, tokens, 1, seed)[0]}

    def decode(self, streams: int, tokens: int, context: int, seed: int) -> dict[str, Any]:
        before = hardware.bandwidth_gbps()
        _, seconds, written = self._run(streams, context, tokens + 1, seed)
        return {"seconds": seconds, "tokens": written, "bandwidth": (before + hardware.bandwidth_gbps()) / 2 * 1e9}

    def prefix(self, tokens: int, seed: int) -> dict[str, Any]:
        salt = f"prefix {next(self._ids)}"
        cold = self._run(1, tokens, 1, seed, salt)[0]
        return {"cold": cold, "seconds": self._run(1, tokens, 1, seed, salt)[0]}

    def _run(self, streams: int, length: int, tokens: int, seed: int, salt: str = "") -> tuple[float, float, int]:
        """Seconds until every stream has a token, seconds after that, and the tokens written in these.

        Without a salt nothing is found in the prefix cache: a prompt that was read before must be read again.
        """
        params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
        start = time.perf_counter()
        for stream in range(streams):
            prompt = protocol.prompt(length, seed, stream)
            id = f"{next(self._ids)}"
            self.engine.add(Request(id, prompt, params, cache_salt=salt or id))
        started: set[str] = set()
        first, written = None, 0
        while self.engine.has_work:
            events = self.engine.step()
            if first is None:
                started |= {event.request_id for event in events if event.tokens}
                first = time.perf_counter() if len(started) == streams else None
            else:
                written += sum(len(event.tokens) for event in events)
            if failed := next((event.error for event in events if event.error), None):
                raise RuntimeError(failed)
        assert first is not None
        return first - start, time.perf_counter() - first, written


INT4 = {"weights": "4 bits, a float16 step for 128", "activations": "int8, a step for 128"}
SPARSE = INT4 | {"weights": "4 bits, a step for 128, half of them zero"}
TWO_OF_FOUR = INT4 | {"weights": "4 bits, a step for 128, two of each four zero"}
INT8 = {"weights": "8 bits, a step a row", "activations": "int8, a step for 128"}
FLOAT_HEAD, SMALL_HEAD = {"head": "bfloat16, screened by 8 bits"}, {"head": "as the rest"}
WORDS = {
    "int4": INT4 | FLOAT_HEAD,
    "int4h4": INT4 | SMALL_HEAD,
    "int4-sparse50": SPARSE | FLOAT_HEAD,
    "int4s50h4": SPARSE | SMALL_HEAD,
    "int4s24": TWO_OF_FOUR | FLOAT_HEAD,
    "int4s24h4": TWO_OF_FOUR | SMALL_HEAD,
    "int8": INT8 | FLOAT_HEAD,
    "int8h8": INT8 | SMALL_HEAD,
    "w8a8": INT8 | {"activations": "int8, a step a token"} | FLOAT_HEAD,
}

if __name__ == "__main__":
    engine = Penjing()
    protocol.serve({"load": engine.load, "prefill": engine.prefill, "decode": engine.decode, "prefix": engine.prefix})
