"""The choice of instruction set, and the threads."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from penjing import kernels
from penjing.formats.affine import Grid

X86 = ["scalar", "avx2", "avx-vnni", "avx512-vnni"]
ORDER = ["scalar", "neon"] if platform.machine() in ("aarch64", "arm64") else X86


def python(*arguments: str, isa: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PENJING_ISA": isa}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)


@pytest.mark.skipif("PENJING_ISA" in os.environ, reason="this is the run with a lower instruction set")
@pytest.mark.parametrize("isa", ORDER[: ORDER.index(kernels.isa())])
def test_the_same_tests_pass_with_lower_instruction_sets(isa: str) -> None:
    here = Path(__file__).parent
    others = [str(file) for file in (*here.glob("test_*.py"), *here.with_name("formats").glob("test_packed*.py"))]
    if isa == "avx-vnni":  # which has only these of its own
        others = [str(here / "test_group.py"), str(here / "test_integer.py")]
        if "does not have it" in python("-c", "import penjing.kernels as k; k.isa()", isa=isa).stderr:
            pytest.skip("this machine has no AVX-VNNI")
    answer = python("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *others, isa=isa)
    assert answer.returncode == 0, answer.stdout[-3000:]


def test_the_instruction_set_can_be_lowered_but_not_invented() -> None:
    say = "import penjing.kernels as k; print(k.isa())"
    assert python("-c", say, isa="scalar").stdout == "scalar\n"
    refused = python("-c", say, isa="sse9")
    assert f"PENJING_ISA=sse9: known are {', '.join(ORDER)}" in refused.stderr


def product(seed: int) -> tuple[kernels.Matrix, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    tensor = kernels.quantize(rng.standard_normal((300, 512)).astype(np.float32), Grid(4, 64))
    x = rng.standard_normal((20, 512)).astype(np.float32)
    return kernels.matrix_from(tensor), x, x @ tensor.decode().T


@pytest.fixture
def restored_threads() -> object:
    before = kernels.threads()
    yield
    kernels.set_threads(before)


@pytest.mark.usefixtures("restored_threads")
def test_any_number_of_threads_gives_the_same_bits() -> None:
    matrix, x, expected = product(0)
    answers = []
    for count in (1, 2, 3, 5):
        kernels.set_threads(count)
        assert kernels.threads() == count
        answers.append(matrix(x))
        assert (answers[-1] == answers[0]).all()
    np.testing.assert_allclose(answers[0], expected, rtol=1e-4, atol=1e-3)


@pytest.mark.usefixtures("restored_threads")
def test_several_python_threads_at_once() -> None:
    kernels.set_threads(2)
    cases = [product(seed) for seed in range(3)]
    alone = [matrix(x) for matrix, x, _ in cases]
    wrong = []

    def work(index: int) -> None:
        matrix, x, _ = cases[index]
        wrong.extend(index for _ in range(50) if not (matrix(x) == alone[index]).all())

    workers = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_a_forked_child_computes_too() -> None:
    code = """
import os, sys
sys.path.insert(0, sys.argv[1])
from test_runtime import product
matrix, x, _ = product(0)
before = matrix(x)
child = os.fork()
if child == 0:
    os._exit(0 if (matrix(x) == before).all() else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    answer = subprocess.run([sys.executable, "-c", code, str(Path(__file__).parent)], timeout=60)
    assert answer.returncode == 0


@pytest.mark.parametrize("count", [0, -1, 257])
def test_threads_out_of_range(count: int) -> None:
    with pytest.raises(ValueError, match="give 1 to 256"):
        kernels.set_threads(count)
