"""llm-compressor: rounding, GPTQ, AWQ, SparseGPT, Wanda, and SparseGPT then GPTQ, as its modifiers come.

"gptq, mse" finds ranges with the observer of least squared error, which its documents advise for few bits.
"""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.awq import AWQModifier
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
from quality_job import Job
from transformers import AutoModelForCausalLM, AutoTokenizer

PRUNERS = {"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}
QUANTIZERS = {"rtn": QuantizationModifier, "gptq": GPTQModifier, "awq": AWQModifier}


def modifier(word: str, job: Job) -> Any:
    if word in PRUNERS:
        return PRUNERS[word](sparsity=0.5, targets=["re:.*layers.*proj$"])
    weights = {"num_bits": job.bits, "type": "int", "symmetric": job.symmetric}
    word, _, observer = word.partition(", ")
    weights |= {"observer": observer} if observer else {}
    weights |= {"strategy": "channel"} if job.group < 0 else {"strategy": "group", "group_size": job.group}
    return QUANTIZERS[word](ignore=["lm_head"], config_groups={"all": {"targets": ["Linear"], "weights": weights}})


if not torch.accelerator.is_available():  # AWQ's modifier asks for one, and then computes where the model is
    torch.accelerator.current_accelerator = lambda *_: torch.device("cpu")
    torch.accelerator.current_device_index = lambda: 0

job = Job.read()
model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.bfloat16)
rows = job.tokens(AutoTokenizer.from_pretrained(job.model))
data = Dataset.from_list([{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows])
words = job.method.split("+")
oneshot(
    model=model,
    dataset=data,
    recipe=[modifier(word, job) for word in words],
    num_calibration_samples=job.rows,
    max_seq_length=job.length,
)
model.save_pretrained(job.output, save_compressed=words[-1] not in PRUNERS)
job.done("llmcompressor")
