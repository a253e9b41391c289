"""AutoRound with its default settings, exported as the float weights that it rounded to."""

from __future__ import annotations

from pathlib import Path

import torch
from auto_round import AutoRound
from quality_job import Job
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

job = Job.read()
tokenizer = AutoTokenizer.from_pretrained(job.model)
model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)
rows = [{"input_ids": torch.tensor(row), "attention_mask": torch.ones(len(row))} for row in job.tokens(tokenizer)]
rounding = AutoRound(
    model,
    tokenizer,
    bits=job.bits,
    group_size=job.group,
    sym=job.symmetric,
    dataset=DataLoader(rows, batch_size=1),
    nsamples=job.rows,
    seqlen=job.length,
    device_map="cpu",
)
rounding.quantize_and_save(job.output, format="fake")
for file in Path(job.output).glob("*/*"):  # it makes a folder of its own inside
    file.rename(Path(job.output) / file.name)
job.done("auto-round")
