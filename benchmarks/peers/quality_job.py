"""What a driver of quality.py is asked for: one JSON object, its only argument.

model: a folder.  text: a file.  rows, length: its first rows of so many tokens are calibrated on.  output: a folder to
write.  method: a word of the tool.  bits, group (-1: a row), symmetric: the grid.

A driver leaves a Hugging Face folder (compressed, or with float32 weights that are what its codes decode to) or, where
its environment cannot write one, `weights.npz` with Hugging Face's names. `about.json` holds the tool's version, and
`bits_per_weight` where the tool's own format decides it.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Job:
    model: str
    text: str
    rows: int
    length: int
    output: str
    method: str
    bits: int
    group: int
    symmetric: bool

    @classmethod
    def read(cls) -> Job:
        return cls(**json.loads(sys.argv[1]))

    def tokens(self, tokenizer: Any) -> list[list[int]]:
        """The rows to calibrate on."""
        words = tokenizer(Path(self.text).read_text(encoding="utf-8"), add_special_tokens=False).input_ids
        return [words[at : at + self.length] for at in range(0, self.rows * self.length, self.length)]

    def done(self, package: str, **about: Any) -> None:
        about["version"] = f"{package} {importlib.metadata.version(package)}"
        Path(self.output).mkdir(parents=True, exist_ok=True)
        (Path(self.output) / "about.json").write_text(json.dumps(about))
