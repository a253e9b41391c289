"""The fuzz target for the loader, for a few hundred cases; ``make fuzz`` goes on for longer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

FUZZ = Path(__file__).parents[1] / "fuzz_loader.py"


def test_damaged_folders_are_refused_or_compute() -> None:
    """In a process of its own, so that a crash is a failure and not the end of all tests."""
    command = [sys.executable, "-W", "ignore", str(FUZZ), "--seed", "5", "--cases", "300", "--seconds", "120"]
    done = subprocess.run(command, capture_output=True, text=True)
    last = done.stdout.strip().splitlines()[-1]
    assert done.returncode == 0, f"{last}\n{done.stderr[-2000:]}"
    assert "BadCheckpoint" in last
    assert "text" in last  # some damage is harmless; if none were, nothing would have been loaded at all
