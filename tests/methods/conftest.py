"""What several tests of methods need."""

from __future__ import annotations

import pytest

from penjing import kernels


@pytest.fixture
def float_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """The solvers' sums are float32: in pairs of bfloat16 more numbers between two codes turn than an oracle bears."""
    monkeypatch.setattr(kernels, "has_pairs", lambda: False)
