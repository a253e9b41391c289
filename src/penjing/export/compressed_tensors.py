"""An artifact in the form that vLLM and transformers read: bitmasks become the packed codes or plain weights they are.

Numbers do not change, only how they are stored; one shard's tensors are in memory at a time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..checkpoint import Checkpoint, artifact, storage, write_safetensors
from ..checkpoint.atomic import plain_errors
from ..checkpoint.folder import is_part, module_of
from ..checkpoint.safetensors import Tensor
from ..errors import BadInput


def write(checkpoint: Checkpoint, folder: Path) -> tuple[str, int]:
    """Write a model folder anew → its digest and its bytes. Raises BadInput for a folder that is not empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadInput(f"{folder}: is there and not empty; give a folder that is empty or does not exist")
    with plain_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    digests, sizes, total = {}, {}, 0
    for file in checkpoint.weight_files:
        tensors, name = _tensors(checkpoint, file), Path(file).stem.replace("pytorch_", "") + ".safetensors"
        digests[name], length = write_safetensors(folder / name, tensors, {"format": "pt"})
        sizes[name] = {tensor: array.nbytes for tensor, array in tensors.items()}
        total += length
    if len(sizes) > 1:
        artifact.write_index(folder, sizes)
    artifact.copy_side_files(checkpoint, folder)
    artifact.complete(folder, _config(checkpoint))
    return artifact.digest_of(digests), total


def _tensors(checkpoint: Checkpoint, file: str) -> dict[str, Tensor]:
    """The tensors of one file, with every bitmask in it undone."""
    tensors: dict[str, Tensor] = {}
    for name in checkpoint.infos:
        module = module_of(name)
        if checkpoint.file_of(name).name != file:
            continue
        if not is_part(name) or f"{module}.weight.bitmask" not in checkpoint.infos:
            tensors[name] = checkpoint.read(name)
        elif name.endswith(".weight.bitmask"):
            weight = checkpoint.weight(module)
            plain = storage.dense(weight, checkpoint.scheme(module).format if _has_steps(checkpoint, module) else None)
            tensors |= {f"{module}.{part}": array for part, array in plain.items()}
    return tensors


def _has_steps(checkpoint: Checkpoint, module: str) -> bool:
    return f"{module}.weight_scale" in checkpoint.infos


def _config(checkpoint: Checkpoint) -> dict[str, Any]:
    config = dict(checkpoint.config)
    quantization = config.pop("quantization_config", None)
    if quantization is not None and (quantization["config_groups"] or quantization.get("kv_cache_scheme")):
        kept = {key: value for key, value in quantization.items() if key != "sparsity_config"}
        config["quantization_config"] = kept | {"quant_method": "compressed-tensors"}
    return config
