"""torchao's weight-only integers, which need no data."""

from __future__ import annotations

import torch
from quality_job import Job
from torchao.quantization import IntxWeightOnlyConfig, MappingType, PerAxis, PerGroup, quantize_
from transformers import AutoModelForCausalLM

job = Job.read()
model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)
settings = IntxWeightOnlyConfig(
    weight_dtype=getattr(torch, f"int{job.bits}"),
    granularity=PerAxis(0) if job.group < 0 else PerGroup(job.group),
    mapping_type=MappingType.SYMMETRIC if job.symmetric else MappingType.ASYMMETRIC,
    scale_dtype=torch.bfloat16,
)
quantize_(
    model, settings, filter_fn=lambda layer, name: isinstance(layer, torch.nn.Linear) and not name.endswith("lm_head")
)
for name, layer in model.named_modules():
    if isinstance(layer, torch.nn.Linear) and not name.endswith("lm_head"):
        layer.weight = torch.nn.Parameter(layer.weight.dequantize().float(), requires_grad=False)
model.save_pretrained(job.output)
job.done("torchao")
