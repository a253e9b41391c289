"""llama.cpp through the functions of its C library: `llama_decode` in a loop, as `llama-bench` calls it.

    python llamacpp.py                       answers the commands of protocol.py
    python llamacpp.py convert FOLDER FILE Q4_0|Q8_0

Logits are computed for the last token of a prompt alone, the next token is the likeliest. A context is made for each
measurement, as small as it may be; the first time a kind of measurement is asked for it is tried with flash attention
and without, in micro-batches of 128 and of 512 tokens, and the fastest is kept.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import protocol

SETTINGS = [(flash, batch) for batch in (512, 128) for flash in (True, False)]


class LlamaCpp:
    def load(self, model: str, threads: int, **_: Any) -> dict[str, Any]:
        llama_cpp.llama_backend_init()
        self._quiet = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p(0))
        self.threads, self.best = threads, {}
        start = time.perf_counter()
        self.model = llama_cpp.llama_model_load_from_file(model.encode(), llama_cpp.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {model}")
        seconds = time.perf_counter() - start
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        kind = Path(model).stem
        return {
            "seconds": seconds,
            "version": f"llama-cpp-python {llama_cpp.__version__}",
            "weights": {"Q4_0": "4 bits, a float16 step for 32", "Q8_0": "8 bits, a float16 step for 32"}[kind],
            "activations": "int8, a step for 32",
            "cache": "float16",
            "head": kind,
        }

    def prefill(self, tokens: int, seed: int) -> dict[str, Any]:
        def measure(*settings: Any) -> dict[str, Any]:
            with Context(self, tokens + 1, 1, *settings) as context:
                start = time.perf_counter()
                context.read([protocol.prompt(tokens, seed)])
                return {"seconds": time.perf_counter() - start}

        return self._fastest(("prefill",), measure)

    def decode(self, streams: int, tokens: int, context: int, seed: int) -> dict[str, Any]:
        def measure(*settings: Any) -> dict[str, Any]:
            with Context(self, context + tokens + 1, streams, *settings) as made:
                last = made.read([protocol.prompt(context, seed, stream) for stream in range(streams)])
                start = time.perf_counter()
                for position in range(context, context + tokens):
                    last = made.write(last, position)
                return {"seconds": time.perf_counter() - start, "tokens": tokens * streams}

        return self._fastest(("decode", streams, context), measure)

    def _fastest(self, kind: tuple[Any, ...], measure: Any) -> dict[str, Any]:
        if kind not in self.best:
            self.best[kind] = min(SETTINGS, key=lambda settings: min(measure(*settings)["seconds"] for _ in range(2)))
        flash, batch = self.best[kind]
        note = f"flash attention {'on' if flash else 'off'}, micro-batches of {batch}"
        return measure(flash, batch) | {"note": note}


class Context:
    """Caches of ``streams`` sequences of ``length`` positions, warmed up by one token."""

    def __init__(self, engine: LlamaCpp, length: int, streams: int, flash: bool, batch: int) -> None:
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_seq_max = length * streams, streams
        settings.n_batch = settings.n_ubatch = self.size = batch
        settings.n_threads = settings.n_threads_batch = engine.threads
        settings.flash_attn_type = (
            llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash else llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        self.vocabulary = engine.vocabulary
        self.context = llama_cpp.llama_init_from_model(engine.model, settings)
        if not self.context:
            raise RuntimeError(f"llama.cpp gives no context of {streams} × {length}")
        self.batch = llama_cpp.llama_batch_init(max(batch, streams), 0, 1)
        self._compute([5] * streams, [0] * streams, range(streams), [True] * streams)
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)

    def __enter__(self) -> Context:
        return self

    def __exit__(self, *_: object) -> None:
        llama_cpp.llama_batch_free(self.batch)
        llama_cpp.llama_free(self.context)

    def read(self, prompts: list[list[int]]) -> list[int]:
        """Compute prompts; the likeliest next token of each."""
        found = []
        for sequence, tokens in enumerate(prompts):
            for low in range(0, len(tokens), self.size):
                part = tokens[low : low + self.size]
                last = [low + index == len(tokens) - 1 for index in range(len(part))]
                self._compute(part, range(low, low + len(part)), [sequence] * len(part), last)
            found.append(self._likeliest(-1))
        return found

    def write(self, tokens: list[int], position: int) -> list[int]:
        """One token of every stream, all at the same position; those that follow."""
        streams = len(tokens)
        self._compute(tokens, [position] * streams, range(streams), [True] * streams)
        return [self._likeliest(index) for index in range(streams)]

    def _compute(
        self, tokens: Sequence[int], positions: Sequence[int], sequences: Sequence[int], wanted: Sequence[bool]
    ) -> None:
        batch = self.batch
        batch.n_tokens = len(tokens)
        for index, (token, position, sequence, want) in enumerate(
            zip(tokens, positions, sequences, wanted, strict=True)
        ):
            batch.token[index], batch.pos[index] = token, position
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, sequence
            batch.logits[index] = want
        if status := llama_cpp.llama_decode(self.context, batch):
            raise RuntimeError(f"llama_decode returned {status}")

    def _likeliest(self, index: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(self.context, index)
        return int(np.ctypeslib.as_array(logits, (self.vocabulary,)).argmax())


def convert(folder: Path, target: Path, kind: str) -> None:
    """Write a Llama checkpoint as GGUF, every matrix in one type, the embedding and the head too.

    Queries and keys are stored with the two halves of a head interleaved, as llama.cpp rotates neighbours.
    """
    import gguf

    config = json.loads((folder / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    stored = getattr(gguf.GGMLQuantizationType, kind)
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    rope = config.get("rope_parameters", config)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, values in read_tensors(folder):
        if "q_proj" in name or "k_proj" in name:
            count = heads if "q_proj" in name else kv_heads
            rows, columns = values.shape
            values = values.reshape(count, 2, rows // count // 2, columns).swapaxes(1, 2).reshape(rows, columns)
        ours = names.get_name(name, try_suffixes=(".weight",))
        assert ours, name
        if values.ndim == 1:
            writer.add_tensor(ours, values)
        else:
            writer.add_tensor(ours, gguf.quants.quantize(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_tensors(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Names and float32 values of a checkpoint in bfloat16 or float32."""
    for file in sorted(folder.glob("*.safetensors")):
        with open(file, "rb") as handle:
            header = json.loads(handle.read(int.from_bytes(handle.read(8), "little")))
            start = handle.tell()
            for name, entry in header.items():
                if name == "__metadata__":
                    continue
                low, high = entry["data_offsets"]
                handle.seek(start + low)
                raw = handle.read(high - low)
                if entry["dtype"] == "F32":
                    values = np.frombuffer(raw, np.float32)
                else:
                    values = (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32)
                yield name, values.reshape(entry["shape"])


if __name__ == "__main__":
    if sys.argv[1:2] == ["convert"]:
        convert(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
    else:
        engine = LlamaCpp()
        protocol.serve({"load": engine.load, "prefill": engine.prefill, "decode": engine.decode})
