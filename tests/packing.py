"""How GPTQ's and AWQ's tools pack unsigned numbers into words of 32 bits, number by number; and a Llama packed so."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from tiny_llama import llama_tensors, make_model

GROUP = 32


def packed_rows(values: np.ndarray, bits: int) -> np.ndarray:
    """Each row of unsigned numbers as one number in base 2 ** bits, lowest first, cut into words of 32 bits."""
    words = []
    for row in values.tolist():
        number = sum(int(value) << (bits * place) for place, value in enumerate(row))
        words.append([number >> (32 * place) & 0xFFFFFFFF for place in range(-(-len(row) * bits // 32))])
    return np.array(words, np.uint32).view(np.int32)


def awq_rows(values: np.ndarray) -> np.ndarray:
    """Of eight numbers a word: the ones at 0, 2, 4, 6, then those at 1, 3, 5, 7."""
    eights = values.reshape(len(values), -1, 8)
    return packed_rows(np.concatenate([eights[..., ::2], eights[..., 1::2]], axis=2).reshape(values.shape), 4)


def packed_llama(folder: Path, method: str, *, scattered: bool = False) -> tuple[Path, dict[str, np.ndarray]]:
    """A small Llama as GPTQ or AWQ packs it, with float32 steps; and the numbers that it stands for."""
    random, plain = np.random.default_rng(0), llama_tensors(np.float32)
    stored: dict[str, np.ndarray] = {}
    for name in list(plain):
        if "proj" not in name:
            stored[name] = plain[name]
            continue
        module, (rows, columns) = name.removesuffix(".weight"), plain[name].shape
        groups = np.arange(columns) // GROUP
        if scattered and "down" in module:
            groups = random.permutation(groups)
        scales = random.uniform(0.01, 0.05, (rows, columns // GROUP)).astype(np.float16).astype(np.float32)
        codes, zeros = random.integers(0, 16, (rows, columns)), random.integers(1, 16, scales.shape)
        plain[name] = (codes - zeros[:, groups]).astype(np.float32) * scales[:, groups]
        if method == "awq":
            parts = {"qweight": awq_rows(codes.T), "qzeros": awq_rows(zeros.T)}
        else:
            parts = {"qweight": np.ascontiguousarray(packed_rows(codes, 4).T), "qzeros": packed_rows(zeros.T - 1, 4)}
            parts["g_idx"] = groups.astype(np.int32)
        stored |= {f"{module}.{part}": array for part, array in parts.items()}
        stored[f"{module}.scales"] = np.ascontiguousarray(scales.T)
    config = {"quant_method": method, "bits": 4, "group_size": GROUP, "desc_act": scattered, "sym": False}
    make_model(folder, stored, quantization_config=config)
    (folder / "quantize_config.json").write_text(json.dumps(config))
    return folder, plain
