"""What makes a folder of shards a model that others load: index, side files, penjing.json and config.json.

config.json says how each module is stored, in compressed-tensors' words. It is written last: a folder without it is
not a model yet.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .. import __version__
from ..recipe import Quantize
from . import floats, kv_cache
from .atomic import replacing, sync_folder, write_json
from .folder import CONFIG, INDEX, Checkpoint, module_of
from .plan import Plan
from .storage import layout

# shard → sha256, bytes, tensors (name → bytes), zeros (module → count), cache (attention → what it loses)
Entries = Mapping[str, dict[str, Any]]


def quantization_config(plan: Plan) -> dict[str, Any] | None:
    """config.json's ``quantization_config``; None when all weights are stored plainly, and the cache stays as it is.

    A bitmask has ``quant_method`` "penjing", so that other programs refuse it instead of finding weights missing.
    """
    quantized = {module: rule.quantize for module, rule in plan.rules.items() if rule.quantize is not None}
    bitmask = plan.bitmask
    if not quantized and not bitmask and plan.recipe.kv_cache is None:
        return None
    settings = list(dict.fromkeys(quantized.values()))
    groups = {}
    for index, quantize in enumerate(settings):
        modules = [module for module, its in quantized.items() if its == quantize]
        groups[f"group_{index}"] = {
            "targets": ["Linear"] if len(settings) == 1 else modules,
            "weights": _weights(quantize),
            "input_activations": _ACTIVATIONS if quantize.activations == "int8" else floats.inputs_config(quantize),
            "output_activations": None,
            "format": layout(quantize),
        }
    layouts = {layout(quantize) for quantize in settings}
    config: dict[str, Any] = {
        "quant_method": "penjing" if bitmask else "compressed-tensors",
        "format": layouts.pop() if len(layouts) == 1 else "mixed-precision" if layouts else "dense",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": sorted({"lm_head", *_plain_modules(plan, quantized)}),
        "kv_cache_scheme": kv_cache.scheme(plan.recipe.kv_cache),
        "global_compression_ratio": None,
    }
    if bitmask:
        config["sparsity_config"] = {"format": "sparse-bitmask", "sparsity_structure": "unstructured"}
    return config


def _plain_modules(plan: Plan, quantized: Container[str]) -> Iterator[str]:
    """Linear layers that are stored plainly; embeddings are none, so readers need not be told."""
    for name, info in plan.checkpoint.infos.items():
        module = module_of(name)
        if name.endswith(".weight") and len(info.shape) == 2 and module not in quantized and "embed" not in module:
            yield module


_ACTIVATIONS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


def _weights(quantize: Quantize) -> dict[str, Any]:
    if quantize.format != "int":
        return floats.weights_config(quantize)
    strategy = {-1: "channel", 0: "tensor"}.get(quantize.group_size, "group")
    return {
        "num_bits": quantize.bits,
        "type": "int",
        "symmetric": quantize.symmetric,
        "strategy": strategy,
        "group_size": quantize.group_size if strategy == "group" else None,
        "dynamic": False,
    }


def write_index(output: Path, shards: Mapping[str, Mapping[str, int]]) -> None:
    """model.safetensors.index.json of several shards; shards: file → its tensors → their bytes."""
    places = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    total = sum(size for tensors in shards.values() for size in tensors.values())
    write_json(output / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))})


def copy_side_files(checkpoint: Checkpoint, output: Path) -> None:
    """Tokenizer, generation settings and the like, each put in place whole."""
    for name, content in checkpoint.side_files.items():
        with replacing(output / name) as temporary:
            if isinstance(content, Path):
                shutil.copyfile(content, temporary)
            else:
                temporary.write_bytes(content)
    sync_folder(output)


def digest_of(files: Mapping[str, str]) -> str:
    """One SHA-256 for all weight files, as ``sha256sum *.safetensors | sha256sum`` makes it; files: name → SHA-256."""
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(files.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def describe(plan: Plan, identity: dict[str, Any], files: Sequence[str], entries: Entries) -> dict[str, Any]:
    """penjing.json: everything about the artifact that does not change from run to run.

    files: all names that the run writes.  entries: shard → what the journal says of it.
    """
    weights = {name: {"sha256": entry["sha256"], "bytes": entry["bytes"]} for name, entry in entries.items()}
    size = sum(entry["bytes"] for entry in entries.values())
    parameters = sum(info.size for info in plan.checkpoint.infos.values())
    targeted = sum(plan.weight(module).size for module in plan.rules)
    sizes = [item for entry in entries.values() for item in entry["tensors"].items()]
    stored = sum(nbytes for name, nbytes in sizes if module_of(name) in plan.rules and not name.endswith(".bias"))
    zeros = sum(count for entry in entries.values() for count in entry["zeros"].values())
    rules = list(dict.fromkeys(plan.rules.values()))
    infos = plan.checkpoint.infos
    copies = [infos[name] for shard in plan.shards for name in shard.copies]
    stacks = [info for info in copies if len(info.shape) == 3 and min(info.shape[:2]) > 1]
    return {
        "penjing": __version__,
        "identity": identity,
        "recipe": plan.recipe.to_json(),
        "resolved": {
            "rules": [asdict(rule) for rule in rules],
            "modules": {module: rules.index(rule) for module, rule in plan.rules.items()},
            "left_as_is": [info.name for info in copies if len(info.shape) > 1],
        },
        "files": list(files),
        "weights": weights,
        "digest": digest_of({name: entry["sha256"] for name, entry in weights.items()}),
        "size_bytes": size,
        "original_size_bytes": plan.checkpoint.size_bytes,
        "parameters": parameters,
        "bits_per_weight": 8 * sum(nbytes for _, nbytes in sizes) / parameters,
        "target_bits_per_weight": 8 * stored / targeted if targeted else 0.0,
        "sparsity": zeros / targeted if targeted else 0.0,
        "clipped": {m: round(c, 6) for entry in entries.values() for m, c in sorted(entry["clipped"].items())},
        "kv_cache": _kv_cache(plan, entries),
        "stacked_bytes": sum(info.nbytes for info in stacks),
        "blocks": plan.blocks,
        "evaluation": None,
    }


def _kv_cache(plan: Plan, entries: Entries) -> dict[str, Any] | None:
    """What penjing.json says of the cache; None where it stays as it is.

    layers: attention → its largest keys and values, and what either loses.  left_as_is: decoder layers that keep none.
    """
    if plan.recipe.kv_cache is None:
        return None
    layers = {name: its for entry in entries.values() for name, its in sorted(entry["cache"].items())}
    blocks = [block.name for shard in plan.shards for block in shard.blocks if block.is_layer]
    without = [block for block in blocks if not any(name.startswith(f"{block}.") for name in layers)]
    return {"kind": plan.recipe.kv_cache, "layers": layers, "left_as_is": without}


def calibration(identity: Mapping[str, Any], verdicts: Mapping[str, dict[str, Any]]) -> dict[str, Any] | None:
    """What penjing.json says of calibration; None when no layer's weight was solved or judged by it.

    own_samples: there where the text is what the model wrote itself; else sha256 of the tokens.
    layers: module → ``loss`` and ``plain_loss``, shares of the layer's output that are lost, and by rounding alone.
    kept_plain: layers where rounding was better, and stayed.  starved: experts that were given all tokens because the
    router chose them too rarely.  uncalibrated: layers that nothing came to, rounded plainly.  unfolded: layers whose
    transform has no place to go to.
    """
    if not verdicts:
        return None
    numbers = ("loss", "plain_loss", "damping")
    flags = ("kept_plain", "starved", "uncalibrated", "unfolded")
    return {
        **identity["calibration"],
        "layers": {m: {name: its[name] for name in numbers if name in its} for m, its in sorted(verdicts.items())},
        **{flag: sorted(module for module, its in verdicts.items() if its.get(flag)) for flag in flags},
    }


def complete(output: Path, config: dict[str, Any]) -> None:
    """Write config.json: from now on the folder is a model."""
    write_json(output / CONFIG, config)
