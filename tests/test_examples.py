"""The examples run as a user would run them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_simplenet() -> None:
    pytest.importorskip("sklearn")
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [sys.executable, "examples/simplenet.py", "--epochs", "3"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    steps = {
        name.strip(): (float(accuracy), int(size.replace(",", "")))
        for name, accuracy, size in re.findall(r"^(\S.*?)\s+([\d.]+)%.*?([\d,]+)\s+[\d.]+ ms$", ran.stdout, re.M)
    }
    float_accuracy, float_size = steps["SimpleNet, float32"]
    assert float_accuracy > 80
    int8_accuracy, int8_size = steps["model.quantize()"]
    assert int8_size <= 0.27 * float_size
    assert abs(int8_accuracy - float_accuracy) < 2
    assert steps["model.prune()"][1] < 0.55 * float_size
    accuracy, size = steps["model.prune() and model.quantize()"]
    assert size < 0.18 * float_size
    assert accuracy > 80
    assert "int8 × int8 dynamic" in ran.stdout
