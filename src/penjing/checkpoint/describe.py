"""What a checkpoint is, from config.json and tensor headers alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import BadInput
from ..formats.floats import FloatGrid
from . import kv_cache
from .atomic import read_json
from .blocks import order_blocks
from .folder import Checkpoint, is_part, module_of, open_checkpoint
from .gguf import GgufCheckpoint

# The first role with a word that a tensor's name has.
_ROLES = (
    ("pictures", ("vision", "visual", "audio", "multi_modal")),
    ("head", ("lm_head", "embed_out")),
    ("embedding", ("embed", "wte", "wpe")),
    ("norms", ("norm", "ln_")),
    ("attention", ("attn", "attention")),
    ("mlp", ("shared_expert",)),
    ("experts", (".experts.",)),
    ("routers", ("router", ".moe.gate.", "mlp.gate.", "block_sparse_moe.gate.")),
    ("mlp", ("mlp", "feed_forward")),
)
_BLOCKS, _SCALES = "_blocks", "_scales"  # of a tensor X in MXFP4: two numbers a byte, and a scale for 32


@dataclass(frozen=True)
class Summary:
    """parameters: numbers of the model, not of its storage.  bits_per_weight: all bytes of tensors over them.

    kv_cache: what servers are to keep keys and values in; None where config.json does not say.
    sparsity: share of zeros in the compressed modules, as compress counted it or as bitmasks show; None when unknown,
    which it is for plain weights (they are not read).  roles: role → parameters and bytes.
    """

    path: str
    family: str
    parameters: int
    layers: int
    size_bytes: int
    bits_per_weight: float
    sparsity: float | None
    format: str
    activations: str
    files: int
    roles: dict[str, dict[str, int]]
    kv_cache: str | None

    def __str__(self) -> str:
        sparse = "unknown (weights are not read)" if self.sparsity is None else f"{self.sparsity:.1%}"
        lines = [
            f"{'model':<16}{self.path}",
            f"{'family':<16}{self.family}, {self.layers} layers",
            f"{'parameters':<16}{self.parameters:,}",
            f"{'size':<16}{self.size_bytes:,} bytes in {self.files} file{'s' if self.files > 1 else ''}",
            f"{'bits per weight':<16}{self.bits_per_weight:.3f}",
            f"{'format':<16}{self.format}, activations {self.activations}",
            f"{'sparsity':<16}{sparse}",
            *([f"{'kv cache':<16}{self.kv_cache}"] if self.kv_cache else []),
            "",
            f"{'role':<12}{'parameters':>16}{'bytes':>16}{'bits':>8}",
        ]
        for role, sizes in self.roles.items():
            bits = 8 * sizes["bytes"] / max(sizes["parameters"], 1)
            lines.append(f"{role:<12}{sizes['parameters']:>16,}{sizes['bytes']:>16,}{bits:>8.3f}")
        return "\n".join(lines)


def describe(path: str | Path) -> Summary:
    """Inspect a folder; raises what `open_checkpoint` raises."""
    checkpoint = open_checkpoint(path)
    roles: dict[str, dict[str, int]] = {}
    for name, info in checkpoint.infos.items():
        sizes = roles.setdefault(_role(name), {"parameters": 0, "bytes": 0})
        sizes["bytes"] += info.stored_bytes
    for name in checkpoint.names:
        roles[_role(name)]["parameters"] += _parameters(checkpoint, name)
    parameters = sum(sizes["parameters"] for sizes in roles.values())
    stored = sum(sizes["bytes"] for sizes in roles.values())
    text = checkpoint.config.get("text_config")
    layers = (text if isinstance(text, dict) else checkpoint.config).get("num_hidden_layers")
    return Summary(
        path=str(checkpoint.path),
        family=str(checkpoint.config.get("model_type", "unknown")),
        parameters=parameters,
        layers=layers if isinstance(layers, int) else sum(b.is_layer for b in order_blocks(checkpoint.names)),
        size_bytes=checkpoint.size_bytes,
        bits_per_weight=8 * stored / max(parameters, 1),
        sparsity=sparsity_of(checkpoint),
        format=format_of(checkpoint),
        activations=", ".join(sorted({scheme.activations for scheme in checkpoint.schemes})) or "float",
        files=len(checkpoint.weight_files),
        roles=dict(sorted(roles.items())),
        kv_cache=kv_cache.kind_of(checkpoint.config),
    )


def _role(name: str) -> str:
    for role, words in _ROLES:
        if any(word in name for word in words):
            return role
    return "other"


def _parameters(checkpoint: Checkpoint, name: str) -> int:
    """Numbers in a tensor of `Checkpoint.names`; of packed ones what their shape says."""
    if name in checkpoint.infos:
        whole = name.removesuffix(_BLOCKS).removesuffix(_SCALES)
        if f"{whole}{_BLOCKS}" in checkpoint.infos and f"{whole}{_SCALES}" in checkpoint.infos:
            return 2 * checkpoint.infos[name].size if name.endswith(_BLOCKS) else 0
        return checkpoint.infos[name].size
    module = module_of(name)
    return math.prod(checkpoint.weight_shape(module))


def sparsity_of(checkpoint: Checkpoint) -> float | None:
    """The share of zeros that compress counted in the modules it compressed; None where it did not make the folder."""
    if (checkpoint.path / "penjing.json").exists():
        noted = read_json(checkpoint.path / "penjing.json", BadInput)
        if isinstance(noted, dict) and isinstance(noted.get("sparsity"), int | float):
            return float(noted["sparsity"])
    return None


def format_of(checkpoint: Checkpoint) -> str:
    """Number formats of the weights, joined by commas: ``bfloat16``, ``int4 g128``, ``int4 g128 gptq``, ``mxfp4`` …"""
    plain = [info for name, info in checkpoint.infos.items() if name.endswith(".weight") and len(info.shape) == 2]
    compressed = sorted({module_of(name) for name in checkpoint.infos if is_part(name)})
    if isinstance(checkpoint, GgufCheckpoint):
        return ", ".join(f"GGUF {kind}" for kind in checkpoint.kinds)
    found = set()
    for module in compressed:
        words = []
        if f"{module}.weight_scale" in checkpoint.infos or f"{module}.qweight" in checkpoint.infos:
            grid = checkpoint.scheme(module).grid
            step = {-1: "channel", 0: "tensor"}.get(grid.group_size, f"g{grid.group_size}")
            kind = grid.kind if isinstance(grid, FloatGrid) else f"int{grid.bits}"
            words += [f"{kind} {step}", *([] if grid.symmetric else ["asymmetric"])]
            words += [checkpoint.scheme(module).format] if f"{module}.qweight" in checkpoint.infos else []
        else:
            words.append(str(checkpoint.infos[f"{module}.weight.compressed"].dtype))
        found.add(" ".join([*words, *(["bitmask"] if f"{module}.weight.bitmask" in checkpoint.infos else [])]))
    if any(f"{name.removesuffix(_SCALES)}{_BLOCKS}" in checkpoint.infos for name in checkpoint.infos):
        found |= {"mxfp4", *(str(np.dtype(info.dtype)) for info in plain)}
    if not found:
        found = {str(np.dtype(info.dtype)) for info in plain or checkpoint.infos.values()}
    return ", ".join(sorted(found))
