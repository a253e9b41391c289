"""vLLM's CPU build, offline: its engine is stepped in this process, prompts and outputs are token ids.

python vllm_cpu.py                       answers the commands of protocol.py
"""

from __future__ import annotations

import os
import time
from typing import Any

import protocol


class Vllm:
    def load(self, model: str, threads: int, kind: str, **_: Any) -> dict[str, Any]:
        os.environ |= {
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": str(threads),
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_NO_USAGE_STATS": "1",
        }
        start = time.perf_counter()
        import vllm

        self.vllm = vllm
        self.engine = vllm.LLM(
            model=model,
            dtype="bfloat16",
            skip_tokenizer_init=True,
            max_model_len=2048,
            max_num_seqs=8,
            enable_prefix_caching=False,
            disable_log_stats=True,
        ).llm_engine
        return {
            "seconds": time.perf_counter() - start,
            "version": f"vLLM {vllm.__version__}",
            "cache": "bfloat16 paged",
            "head": "bfloat16",
        } | {
            "bf16": {"weights": "bfloat16", "activations": "bfloat16"},
            "w8a8": {"weights": "8 bits, a step a row", "activations": "int8, a step a token"},
        }[kind]

    def prefill(self, tokens: int, seed: int) -> dict[str, Any]:
        return {"seconds": self._run(1, tokens, 1, seed)[0]}

    def decode(self, streams: int, tokens: int, context: int, seed: int) -> dict[str, Any]:
        _, seconds, written = self._run(streams, context, tokens + 1, seed)
        return {"seconds": seconds, "tokens": written}

    def _run(self, streams: int, length: int, tokens: int, seed: int) -> tuple[float, float, int]:
        """Seconds until every stream has a token, seconds after that, and the tokens written in these."""
        vllm = self.vllm
        params = vllm.SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        for stream in range(streams):
            prompt = vllm.TokensPrompt(prompt_token_ids=protocol.prompt(length, seed, stream))
            self.engine.add_request(f"{seed}-{stream}-{time.monotonic_ns()}", prompt, params)
        written: dict[str, int] = {}
        first = already = None
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                written[output.request_id] = len(output.outputs[0].token_ids)
            if first is None and len(written) == streams:
                first, already = time.perf_counter(), sum(written.values())
        assert first is not None
        return first - start, time.perf_counter() - first, sum(written.values()) - already


if __name__ == "__main__":
    engine = Vllm()
    protocol.serve({"load": engine.load, "prefill": engine.prefill, "decode": engine.decode})
