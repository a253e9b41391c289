"""GPTQModel with its default settings; the saved checkpoint is decoded by its own layers."""

from __future__ import annotations

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from quality_job import Job
from transformers import AutoModelForCausalLM, AutoTokenizer

job = Job.read()
rows = job.tokens(AutoTokenizer.from_pretrained(job.model))
settings = QuantizeConfig(bits=job.bits, group_size=job.group, sym=job.symmetric, device="cpu")
model = GPTQModel.load(job.model, settings)
model.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows], batch_size=1)
model.save(job.output + "-packed")
packed = GPTQModel.load(job.output + "-packed", device="cpu", backend=BACKEND.TORCH)
decoded = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)
found = {name: layer for name, layer in packed.model.named_modules() if hasattr(layer, "dequantize_weight")}
for name, layer in found.items():
    decoded.get_submodule(name).weight.data = layer.dequantize_weight().T.float().contiguous()
assert found
decoded.save_pretrained(job.output)
job.done("GPTQModel")
