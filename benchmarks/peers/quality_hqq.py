"""HQQ, which needs no data: steps and zero points of 16 bits, groups along the rows."""

from __future__ import annotations

import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from quality_job import Job
from transformers import AutoModelForCausalLM

job = Job.read()
model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)
for name, layer in model.named_modules():
    if isinstance(layer, torch.nn.Linear) and name != "lm_head":
        group = layer.in_features if job.group < 0 else job.group
        settings = BaseQuantizeConfig(nbits=job.bits, group_size=group, axis=1)
        held = HQQLinear(layer, settings, compute_dtype=torch.float32, device="cpu", del_orig=False)
        layer.weight.data = held.dequantize().reshape(layer.weight.shape)
model.save_pretrained(job.output)
job.done("hqq")
