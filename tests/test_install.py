"""A plain `pip install .` into a fresh environment: small, without torch, and working."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOVELIST = ROOT / "examples" / "novelist"
LIMIT_BYTES = 150_000_000

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("install")
    subprocess.run([sys.executable, "-m", "venv", folder / "env"], check=True)
    install = [
        folder / "env/bin/python",
        "-m",
        "pip",
        "install",
        "--quiet",
        "--config-settings",
        f"build-dir={folder / 'build'}",
        ROOT,
    ]
    answer = subprocess.run(install, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    return folder / "env"


def penjing(environment: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    program = [environment / "bin" / "penjing", *arguments]
    return subprocess.run(program, capture_output=True, text=True, cwd=environment, env={"PATH": "/usr/bin:/bin"})


def test_everything_together_is_small(environment: Path) -> None:
    (packages,) = environment.glob("lib/python3*/site-packages")
    brought_by_venv = {"pip", "setuptools", "_distutils_hack", "pkg_resources"}
    sizes = {
        entry.name: sum(file.stat().st_size for file in [entry, *entry.rglob("*")] if file.is_file())
        for entry in packages.iterdir()
        if entry.name.split("-")[0] not in brought_by_venv
    }
    largest = sorted(sizes.items(), key=lambda item: -item[1])[:8]
    print(f"\ninstalled: {sum(sizes.values()) / 1e6:.1f} MB; largest: {largest}")
    assert sum(sizes.values()) <= LIMIT_BYTES, largest
    assert not {"torch", "transformers", "nvidia", "triton"} & sizes.keys()


@pytest.mark.parametrize("command", [["--help"], ["doctor"], ["inspect", str(NOVELIST)]])
def test_commands_work_without_the_extras(environment: Path, command: list[str]) -> None:
    answer = penjing(environment, *command)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout


def test_doctor_says_what_the_small_install_leaves_out(environment: Path) -> None:
    missing = json.loads(penjing(environment, "doctor", "--json").stdout)["missing"]
    assert "torch" in {part["name"] for part in missing}


def test_each_verb_that_needs_torch_says_so_in_one_line(environment: Path) -> None:
    code = "import penjing\ntry:\n    penjing.quantize\nexcept ImportError as error:\n    print(error)"
    answer = subprocess.run([environment / "bin/python", "-c", code], capture_output=True, text=True, cwd=environment)
    assert answer.returncode == 0, answer.stderr
    assert "torch" in answer.stdout
