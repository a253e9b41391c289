"""llama.cpp's quantizer with an importance matrix: the mean square of each input column, which quality.py measured.

Where a matrix's columns are no multiple of 256, llama.cpp falls back from a k-quant to a type of blocks of 32, so
bits per weight are counted from the file. Embedding and head stay as they are.
"""

from __future__ import annotations

import ctypes
import json
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
from llamacpp import convert
from quality_job import Job


def importance(names: dict[str, str], file: str) -> tuple[ctypes.Array, list]:
    """The library's array of (name, values, size), ended by nothing, and what must stay alive."""
    held = [(names[name].encode(), np.ascontiguousarray(values, np.float32)) for name, values in np.load(file).items()]
    array = (llama_cpp.llama_model_imatrix_data * (len(held) + 1))()
    for entry, (name, values) in zip(array, held, strict=False):
        entry.name, entry.size = name, values.size
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    return array, held


job = Job.read()
output = Path(job.output)
output.mkdir(parents=True, exist_ok=True)
config = json.loads((Path(job.model) / "config.json").read_text())
names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
convert(Path(job.model), output / "F32.gguf", "F32")
settings = llama_cpp.llama_model_quantize_default_params()
settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{job.method}")
settings.token_embedding_type = settings.output_tensor_type = gguf.GGMLQuantizationType.F32
theirs = {name: names.get_name(name, try_suffixes=(".weight",)) for name in np.load(job.text + ".npz")}
settings.imatrix, alive = importance(theirs, job.text + ".npz")
files = [str(output / name).encode() for name in ("F32.gguf", "quantized.gguf")]
if llama_cpp.llama_model_quantize(*files, ctypes.byref(settings)):
    raise SystemExit(f"llama.cpp does not quantize to {job.method}")
stored = {tensor.name: tensor for tensor in gguf.GGUFReader(output / "quantized.gguf").tensors}
weights, size = {}, 0
for name, theirs_name in theirs.items():
    tensor = stored[theirs_name]
    values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    size += tensor.n_bytes
    if "q_proj" in name or "k_proj" in name:
        heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
        rows, columns = values.shape
        values = values.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
    weights[name] = values
np.savez(output / "weights.npz", **weights)
kinds = sorted({stored[name].tensor_type.name for name in theirs.values()})
parameters = sum(values.size for values in weights.values())
job.done("llama-cpp-python", bits_per_weight=8 * size / parameters, note=", ".join(kinds))
