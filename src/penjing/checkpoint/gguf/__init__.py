"""llama.cpp's GGUF: files of one model with its configuration and its tokenizer, read as a checkpoint and written."""

from __future__ import annotations

from .file import GgufFile, Written, write_gguf
from .model import GgufCheckpoint

__all__ = ["GgufCheckpoint", "GgufFile", "Written", "write_gguf"]
