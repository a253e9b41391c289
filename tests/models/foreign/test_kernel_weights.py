"""Weights that look like tensors: every use of them gives what a tensor of the same numbers gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from torch.nn import functional  # noqa: E402

from penjing.kernels import Matrix, matrix_from  # noqa: E402
from penjing.models.foreign.weights import Experts, KernelWeight  # noqa: E402

NUMBERS = np.random.default_rng(0).standard_normal((13, 7)).astype(np.float32)
X, BIAS = torch.randn(2, 3, 7), torch.randn(13)
PLACES = torch.tensor([[1, 4, 12], [0, 2, 1]])
USES: dict[str, tuple[Callable[[Any], Any], bool]] = {  # and whether a kernel computes it
    "linear": (lambda w: functional.linear(X, w), True),
    "linear with a bias": (lambda w: functional.linear(X, w, BIAS), True),
    "product with the transpose": (lambda w: X @ w.T + BIAS, True),
    "matmul": (lambda w: torch.matmul(X, w.t()), True),
    "addmm": (lambda w: torch.addmm(BIAS, X[0], w.T), True),
    "addmm with factors": (lambda w: torch.addmm(BIAS, X[0], w.T, beta=0.5, alpha=2.0), False),
    "linear of the transpose": (lambda w: functional.linear(BIAS[None], w.T), False),
    "product from the left": (lambda w: w @ X[0].T, False),
    "in a list": (lambda w: torch.cat([w, w]), False),
    "a method": (lambda w: w.sum(dim=0), False),
    "size": (lambda w: torch.tensor([*w.shape, w.size(0), w.ndim]), True),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("cuts", [[], [5], [1, 12]])
def test_uses(use: str, cuts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    compute, by_kernel = USES[use]
    weight = KernelWeight([matrix_from(part) for part in np.split(NUMBERS, cuts)])
    right = compute(torch.from_numpy(NUMBERS))
    if by_kernel:
        monkeypatch.setattr(Matrix, "decode", None)
    torch.testing.assert_close(compute(weight), right, atol=1e-5, rtol=1e-5)


def test_embedding_reads_the_rows_that_it_needs() -> None:
    table = KernelWeight([matrix_from(NUMBERS)])
    right = functional.embedding(PLACES, torch.from_numpy(NUMBERS))
    torch.testing.assert_close(functional.embedding(PLACES, table, padding_idx=1), right, atol=0, rtol=0)


def test_modules_take_them_in_place_of_parameters() -> None:
    layer = torch.nn.Linear(7, 13)
    right = functional.linear(X, torch.from_numpy(NUMBERS), layer.bias)
    del layer.weight
    layer.weight = KernelWeight([matrix_from(NUMBERS)])
    torch.testing.assert_close(layer(X), right, atol=1e-5, rtol=1e-5)
    assert list(layer.state_dict()) == ["bias"]


def test_experts_are_found_by_number_and_by_tensor() -> None:
    experts = Experts([KernelWeight([matrix_from(NUMBERS * n)]) for n in (1, 2, 3)])
    assert tuple(experts.shape) == (3, 13, 7)
    torch.testing.assert_close(experts[torch.tensor(2)].decode(), torch.from_numpy(3 * NUMBERS))
    torch.testing.assert_close(experts[0].decode(), torch.from_numpy(NUMBERS))
