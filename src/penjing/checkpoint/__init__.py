"""Checkpoints: folders of tensors, read strictly and one tensor at a time, written whole or not at all."""

from __future__ import annotations

from .folder import Checkpoint, open_checkpoint
from .safetensors import SafetensorsFile, read_safetensors, write_safetensors
from .storage import Weight
from .tensors import TensorInfo

__all__ = [
    "Checkpoint",
    "SafetensorsFile",
    "TensorInfo",
    "Weight",
    "open_checkpoint",
    "read_safetensors",
    "write_safetensors",
]
