"""Weights that look like tensors to transformers' modules; products with them run on Penjing's kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ...kernels import Matrix


class KernelWeight:
    """A weight (out, in) in place of a parameter, or its transpose (in, out).

    matrices: whose rows, one after another, are the weight's; all of them have the same inputs.
    Products and look-ups are computed on what the matrices hold, in float32; whatever else a module does with its
    weight it does with a copy of the numbers.
    """

    dtype, device, requires_grad, ndim = torch.float32, torch.device("cpu"), False, 2

    def __init__(self, matrices: Sequence[Matrix], transposed: bool = False) -> None:
        self.matrices = tuple(matrices)
        self.transposed = transposed

    @property
    def shape(self) -> torch.Size:
        rows, columns = sum(matrix.rows for matrix in self.matrices), self.matrices[0].columns
        return torch.Size((columns, rows) if self.transposed else (rows, columns))

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    @property
    def T(self) -> KernelWeight:
        return KernelWeight(self.matrices, not self.transposed)

    def t(self) -> KernelWeight:
        return self.T

    def decode(self) -> Tensor:
        """The numbers, as a tensor of `shape`."""
        rows = torch.from_numpy(np.concatenate([matrix.decode() for matrix in self.matrices]))
        return rows.T if self.transposed else rows

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.decode(), name)

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: object,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = kwargs or {}
        if (ours := _OURS.get(function)) is not None and (result := ours(*args, **named)) is not None:
            return result
        return function(*(_plain(each) for each in args), **{name: _plain(each) for name, each in named.items()})


def _plain(value: Any) -> Any:
    """An argument with tensors in place of weights, those in lists too."""
    if isinstance(value, (list, tuple)):
        return type(value)(map(_plain, value))
    return value.decode() if isinstance(value, KernelWeight) else value


def multiply(x: Tensor, weight: KernelWeight, bias: Tensor | None = None) -> Tensor:
    """x (…, in) times the transpose of a weight (out, in), and the bias (out,): float32 (…, out)."""
    rows = x.reshape(-1, x.shape[-1]).to(torch.float32).contiguous().numpy()
    parts = [torch.from_numpy(matrix(rows)) for matrix in weight.matrices]
    product = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
    if bias is not None:
        product += bias
    return product.reshape(*x.shape[:-1], product.shape[-1])


def _linear(input: Any, weight: Any, bias: Tensor | None = None) -> Tensor | None:
    if not isinstance(input, Tensor) or not isinstance(weight, KernelWeight) or weight.transposed:
        return None
    return multiply(input, weight, bias)


def _matmul(input: Any, other: Any) -> Tensor | None:
    if not isinstance(input, Tensor) or not isinstance(other, KernelWeight) or not other.transposed:
        return None
    return multiply(input, other)


def _addmm(input: Any, mat1: Any, mat2: Any, *, beta: float = 1, alpha: float = 1) -> Tensor | None:
    if (beta, alpha) != (1, 1) or not isinstance(input, Tensor):
        return None
    product = _matmul(mat1, mat2)
    return None if product is None else product + input


def _embedding(
    input: Any, weight: Any, padding_idx: int | None = None, max_norm: float | None = None, *rest: Any, **more: Any
) -> Tensor | None:
    if not isinstance(weight, KernelWeight) or weight.transposed or len(weight.matrices) > 1 or max_norm is not None:
        return None
    tokens = input.reshape(-1).numpy()
    return torch.from_numpy(weight.matrices[0].decode(tokens)).reshape(*input.shape, -1)


_OURS: dict[Callable[..., Any], Callable[..., Tensor | None]] = {
    functional.linear: _linear,
    functional.embedding: _embedding,
    torch.matmul: _matmul,
    torch.mm: _matmul,
    torch.addmm: _addmm,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    Tensor.mm: _matmul,
}


class Experts:
    """The weights of several experts in place of one tensor of all of them: ``weights[expert]`` is one."""

    def __init__(self, weights: Sequence[KernelWeight]) -> None:
        self.weights = tuple(weights)
        self.shape = torch.Size((len(self.weights), *self.weights[0].shape))

    def __getitem__(self, expert: int | Tensor) -> KernelWeight:
        return self.weights[int(expert)]
