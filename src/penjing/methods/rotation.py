"""Rotations: weights and activations seen along other axes, where no single channel stands out.

Q = D · H / √n with H a Hadamard matrix and D random signs (QuIP, Chee et al., 2023; QuaRot, Ashkboos et al.,
2404.00456). A layer that reads x becomes W Q and reads x Q; a layer that makes y makes y Q with Qᵀ W. Q is orthogonal,
so nothing changes but what rounding does. H of order n = m · 2^k is the Kronecker product of Paley's matrix of order m,
where m − 1 or m / 2 − 1 is a fitting prime, with 2 × 2 ones; this reaches the widths of nearly all models. Widths it
does not reach are rotated in blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import BadInput
from .statistics import Statistics

Floats = NDArray[np.float32]
_FACTOR = 64  # columns that one matrix product of a power of two turns


@cache
def hadamard(order: int) -> Floats:
    """A Hadamard matrix of that order: ±1, float32, rows orthogonal. BadInput where Paley's constructions have none."""
    if order == 1:
        return np.ones((1, 1), np.float32)
    if order % 2 == 0 and (order == 2 or _is_known(order // 2)):
        half = hadamard(order // 2)
        return np.block([[half, half], [half, -half]])
    if order % 4 == 0 and _is_prime(order - 1):
        return _paley_one(order - 1)
    if order % 4 == 0 and _is_prime(order // 2 - 1) and (order // 2 - 1) % 4 == 1:
        return _paley_two(order // 2 - 1)
    raise BadInput(f"no Hadamard matrix of order {order} is known here; rotate in blocks that divide it")


def _is_known(order: int) -> bool:
    if order in (1, 2):
        return True
    if order % 4:
        return False
    two = order // 2 - 1
    return _is_prime(order - 1) or (_is_prime(two) and two % 4 == 1) or _is_known(order // 2)


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))


def _jacobsthal(prime: int) -> Floats:
    """χ(i − j): 1 for squares modulo the prime, −1 for others, 0 on the diagonal."""
    character = -np.ones(prime, np.float32)
    character[[i * i % prime for i in range(1, prime)]] = 1
    character[0] = 0
    index = np.arange(prime)
    found: Floats = character[(index[:, None] - index) % prime]
    return found


def _bordered(inner: Floats, sign: int) -> Floats:
    """[0, 1; sign, inner]."""
    order = len(inner) + 1
    whole = np.zeros((order, order), np.float32)
    whole[0, 1:], whole[1:, 0], whole[1:, 1:] = 1, sign, inner
    return whole


def _paley_one(prime: int) -> Floats:
    return np.eye(prime + 1, dtype=np.float32) + _bordered(_jacobsthal(prime), -1)


def _paley_two(prime: int) -> Floats:
    inner, eye = _bordered(_jacobsthal(prime), 1), np.eye(prime + 1, dtype=np.float32)
    return np.kron(inner, np.array([[1, 1], [1, -1]], np.float32)) + np.kron(
        eye, np.array([[1, -1], [-1, -1]], np.float32)
    )


def largest_block(size: int) -> int:
    """The largest divisor of a width that has a Hadamard matrix: the width itself, if it has one."""
    return max(divisor for divisor in range(1, size + 1) if size % divisor == 0 and _is_known(divisor))


@dataclass(frozen=True)
class Rotation:
    """Q (n, n): orthogonal, of blocks of ``block`` columns on the diagonal.  signs: ±1 float32 (n,)."""

    signs: Floats
    block: int

    def rows(self, x: NDArray[Any]) -> Floats:
        """x Q for x (…, n): float32."""
        return self._transformed(self._checked(x) * self.signs)

    def rows_back(self, x: NDArray[Any]) -> Floats:
        """x Qᵀ for x (…, n), the inverse of `rows`: float32."""
        return self._transformed(self._checked(x), back=True) * self.signs

    def input_side(self, weight: NDArray[Any]) -> NDArray[Any]:
        """W Q, for a layer whose input will be x Q: (out, n), the dtype stays."""
        return self.rows(weight).astype(weight.dtype)

    def output_side(self, weight: NDArray[Any]) -> NDArray[Any]:
        """Qᵀ W, for a layer whose output shall be y Q: (n, …) weight or (n,) bias, the dtype stays."""
        return np.ascontiguousarray(self.rows(weight.T).T).astype(weight.dtype)

    def statistics(self, statistics: Statistics) -> Statistics:
        """The hessian of x Q from that of x; what cannot be known of x Q without seeing it is left out."""
        hessian = self.rows(self.rows(statistics["hessian"]).T)
        norms = np.sqrt(np.maximum(np.diagonal(hessian), 0))
        return Statistics({"hessian": (hessian + hessian.T) / 2, "input_norm": norms.astype(np.float32)})

    def _checked(self, x: NDArray[Any]) -> Floats:
        if x.shape[-1] != len(self.signs):
            raise BadInput(f"a rotation of {len(self.signs)} columns was given {x.shape[-1]}")
        return x.astype(np.float32)

    def _transformed(self, x: Floats, back: bool = False) -> Floats:
        shape = x.shape
        sizes = _factors(self.block)
        y = x.reshape(-1, *sizes)
        for axis, size in enumerate(sizes, 1):
            matrix = hadamard(size)
            y = np.moveaxis(np.moveaxis(y, axis, -1) @ (matrix.T if back else matrix), -1, axis)
        y = np.ascontiguousarray(y).reshape(shape)
        y *= np.float32(self.block**-0.5)
        return y


def _factors(order: int) -> list[int]:
    """The orders whose Kronecker product turns a block: powers of two up to 64, and the smallest that has the rest."""
    rest, sizes = order, []
    while rest % 2 == 0 and rest > 1 and _is_known(rest // 2):
        rest //= 2
    twos = order // rest
    while twos > 1:
        sizes.append(min(twos, _FACTOR))
        twos //= sizes[-1]
    return [rest, *sizes] if rest > 1 or not sizes else sizes


def random_rotation(size: int, seed: int, block: int | None = None) -> Rotation:
    """Signs drawn by seed for a width; block: of columns that mix (a head's, say), by default the largest there is."""
    block = largest_block(size) if block is None else block
    if block < 1 or size % block:
        raise BadInput(f"block={block} does not divide {size} columns")
    hadamard(_factors(block)[0])
    signs = np.where(np.random.default_rng(seed).random(size) < 0.5, -1, 1).astype(np.float32)
    return Rotation(signs, block)


def absorb_gain(weight: NDArray[Any], gain: NDArray[Any]) -> NDArray[Any]:
    """A reader's weight (out, in) that has taken over the gain (in,) of the norm before it, whose own becomes ones.

    Needed before a rotation: an RMS norm without a gain commutes with it.
    """
    return (weight.astype(np.float32) * gain.astype(np.float32)).astype(weight.dtype)
