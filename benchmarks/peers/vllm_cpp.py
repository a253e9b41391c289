"""vllm.cpp through its C interface (ABI 5), in any Python.

    python vllm_cpp.py                       answers the commands of protocol.py
    python vllm_cpp.py convert FOLDER TARGET

It takes text, not tokens, and finds prefixes again that it has seen, so prompts are single letters in an order that
changes each time. Decoding is timed as the difference of two runs, with one token and with many.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import random
import sys
import time
from ctypes import POINTER, byref, c_bool, c_char_p, c_float, c_int32, c_uint64, c_void_p
from pathlib import Path
from typing import Any

import protocol

ABI = 5
LETTERS = "abcdefghiklmnoprstuvwy"
BLOCK = 32
Callback = ctypes.CFUNCTYPE(c_bool, c_char_p, c_bool, c_void_p)


class ModelParams(ctypes.Structure):
    _fields_ = (
        ("model_path", c_char_p),
        ("tokenizer_config_path", c_char_p),
        *((name, c_int32) for name in ("block_size", "num_blocks", "max_model_len", "max_num_seqs")),
        ("tool_parser", c_char_p),
        ("reasoning_parser", c_char_p),
    )


class SamplingParams(ctypes.Structure):
    _fields_ = (
        ("temperature", c_float),
        ("top_p", c_float),
        ("top_k", c_int32),
        ("min_p", c_float),
        ("max_tokens", c_int32),
        ("seed", c_uint64),
        ("has_seed", c_int32),
        ("presence_penalty", c_float),
        ("frequency_penalty", c_float),
        ("repetition_penalty", c_float),
        *((name, c_int32) for name in ("min_tokens", "ignore_eos")),
        ("stop", POINTER(c_char_p)),
        ("n_stop", c_int32),
        ("structured_json", c_char_p),
        ("structured_regex", c_char_p),
        ("structured_choice", POINTER(c_char_p)),
        ("n_structured_choice", c_int32),
        ("structured_grammar", c_char_p),
        ("structured_json_object", c_int32),
    )


class Completion(ctypes.Structure):
    _fields_ = (
        ("text", c_void_p),
        ("finish_reason", c_char_p),
        ("prompt_tokens", c_int32),
        ("completion_tokens", c_int32),
    )


class VllmCpp:
    def load(self, model: str, threads: int, library: str, commit: str, **_: Any) -> dict[str, Any]:
        os.environ["VLLM_CPP_CPU_THREADS"] = str(threads)
        self.library = ctypes.CDLL(library)
        self.library.vllm_last_error.restype = c_char_p
        self.library.vllm_model_params_default.restype = ModelParams
        self.library.vllm_sampling_params_default.restype = SamplingParams
        if (found := self.library.vllm_abi_version()) != ABI:
            raise RuntimeError(f"{library} has ABI {found}, and {ABI} is spoken here")
        params = self.library.vllm_model_params_default()
        params.model_path, params.block_size, params.num_blocks = model.encode(), BLOCK, 128
        params.max_model_len, params.max_num_seqs = 2048, 8
        self.engine, self._seeds = c_void_p(), itertools.count()
        start = time.perf_counter()
        self._check(self.library.vllm_engine_load(byref(params), byref(self.engine)))
        seconds = time.perf_counter() - start
        self.begin = 0  # tokens that its tokenizer puts before a prompt
        done = Completion()
        text, settings = self._text(10), self._settings(1)
        self._check(self.library.vllm_complete(self.engine, text, byref(settings), byref(done)))
        self.begin = done.prompt_tokens - 10
        self.library.vllm_completion_free(byref(done))
        if self.begin not in (0, 1):
            raise RuntimeError(f"10 letters became {done.prompt_tokens} tokens")
        self.library.vllm_version.restype = c_char_p
        return {
            "seconds": seconds,
            "version": f"vllm.cpp {self.library.vllm_version().decode()} ({commit})",
            "weights": "bfloat16",
            "activations": "bfloat16",
            "cache": "paged",
            "head": "bfloat16",
        }

    def prefill(self, tokens: int, **_: Any) -> dict[str, Any]:
        return {"seconds": self._run(1, tokens, 1)}

    def decode(self, streams: int, tokens: int, context: int, **_: Any) -> dict[str, Any]:
        first = self._run(streams, context, 1)
        return {"seconds": self._run(streams, context, tokens + 1) - first, "tokens": tokens * streams}

    def _run(self, streams: int, length: int, tokens: int) -> float:
        """Seconds until every one of the streams is written."""
        settings = self._settings(tokens)
        callback = Callback(lambda text, finished, data: True)
        requests = [c_void_p() for _ in range(streams)]
        texts = [self._text(length - self.begin) for _ in requests]
        start = time.perf_counter()
        for text, request in zip(texts, requests, strict=True):
            self._check(
                self.library.vllm_request_submit(self.engine, text, byref(settings), callback, None, byref(request))
            )
        for request in requests:
            self._check(self.library.vllm_request_wait(request))
        seconds = time.perf_counter() - start
        for request in requests:
            self.library.vllm_request_free(request)
        return seconds

    def _text(self, letters: int) -> bytes:
        draw = random.Random(next(self._seeds))
        return "".join(" " + draw.choice(LETTERS) for _ in range(letters)).encode()

    def _settings(self, tokens: int) -> SamplingParams:
        settings: SamplingParams = self.library.vllm_sampling_params_default()
        settings.temperature, settings.max_tokens, settings.ignore_eos = 0, tokens, 1
        return settings

    def _check(self, status: int) -> None:
        if status:
            raise RuntimeError(self.library.vllm_last_error().decode() or f"status {status}")


def convert(folder: Path, target: Path) -> None:
    """The same checkpoint by links, with a tokenizer that has a text for every row of the head."""
    target.mkdir(parents=True)
    for file in folder.iterdir():
        (target / file.name).symlink_to(file.resolve())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    known = tokenizer["model"]["vocab"]
    taken = {*known.values(), *(token["id"] for token in tokenizer["added_tokens"])}
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    known |= {f"filler{index}": index for index in range(size) if index not in taken}
    (target / "tokenizer.json").unlink()
    (target / "tokenizer.json").write_text(json.dumps(tokenizer))


if __name__ == "__main__":
    if sys.argv[1:2] == ["convert"]:
        convert(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        engine = VllmCpp()
        protocol.serve({"load": engine.load, "prefill": engine.prefill, "decode": engine.decode})
