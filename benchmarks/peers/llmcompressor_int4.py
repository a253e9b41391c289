"""llm-compressor on the same task: int4 in groups of 128.   python … MODEL OUTPUT [TEXT SAMPLES LENGTH]

Without a text by rounding to nearest; with one by GPTQ, calibrated on its first SAMPLES × LENGTH tokens. Where the
processor has no products of bfloat16, GPTQ is given the model in float32, which is several times as fast there.
"""

import sys
from pathlib import Path

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

source, output, *calibration = sys.argv[1:]
scheme = {"targets": "Linear", "scheme": "W4A16", "ignore": ["lm_head"]}
short = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() or not calibration
model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16 if short else torch.float32)
if calibration:
    text, samples, length = Path(calibration[0]).read_text(encoding="utf-8"), int(calibration[1]), int(calibration[2])
    words = AutoTokenizer.from_pretrained(source)(text, add_special_tokens=False).input_ids
    rows = [words[at : at + length] for at in range(0, samples * length, length)]
    data = Dataset.from_list([{"input_ids": row, "attention_mask": [1] * length} for row in rows])
    oneshot(
        model=model,
        recipe=GPTQModifier(**scheme),
        dataset=data,
        num_calibration_samples=samples,
        max_seq_length=length,
    )
else:
    oneshot(model=model, recipe=QuantizationModifier(**scheme))
model.save_pretrained(output, save_compressed=True)
