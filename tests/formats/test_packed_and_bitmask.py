"""Packed words and bitmasks: there and back, and the same words as compressed-tensors'."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from penjing import kernels
from penjing.formats import bitmask, packed

quick = settings(max_examples=60, deadline=None)


@st.composite
def coded(draw: st.DrawFn) -> tuple[int, np.ndarray]:
    bits = draw(st.integers(2, 8))
    shape = draw(st.tuples(st.integers(1, 5), st.integers(1, 70)))
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    return bits, draw(hnp.arrays(np.int8, shape, elements=st.integers(low, high)))


@quick
@given(coded())
def test_pack_and_back(case: tuple[int, np.ndarray]) -> None:
    bits, codes = case
    words = packed.pack(codes, bits)
    assert words.shape == (len(codes), packed.words(codes.shape[1], bits))
    assert (packed.unpack(words, bits, codes.shape[1]) == codes).all()
    assert (kernels.pack(codes, bits) == words).all()
    assert (kernels.unpack(words, bits, codes.shape[1]) == codes).all()


@quick
@given(coded())
def test_the_words_are_compressed_tensors_own(case: tuple[int, np.ndarray]) -> None:
    torch = pytest.importorskip("torch")
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    bits, codes = case
    words = helpers.pack_to_int32(torch.tensor(codes), bits)
    assert (packed.pack(codes, bits) == words.numpy()).all()
    back = helpers.unpack_from_int32(torch.tensor(packed.pack(codes, bits)), bits, torch.Size(codes.shape))
    assert (back.numpy() == codes).all()


@st.composite
def sparse(draw: st.DrawFn) -> np.ndarray:
    dtype = draw(st.sampled_from([np.int8, np.int16, np.int32, np.float16, ml_dtypes.bfloat16, np.float32]))
    shape = draw(st.tuples(st.integers(1, 6), st.integers(1, 150)))
    whole = draw(hnp.arrays(np.int8, shape, elements=st.sampled_from([0, 0, 0, 1, -1, 5, -128, 127])))
    matrix = whole.astype(dtype)
    return -matrix if draw(st.booleans()) else matrix  # so that there are negative zeros too


@quick
@given(sparse())
def test_bitmask_and_back(matrix: np.ndarray) -> None:
    tensor = bitmask.encode(matrix)
    assert len(tensor.values) == np.count_nonzero(matrix.astype(np.float32))
    assert (tensor.decode() == matrix).all()
    fast = kernels.bitmask_encode(matrix)
    assert fast.shape == tensor.shape
    for name in ("values", "bitmask", "row_offsets"):
        ours, theirs = getattr(fast, name), getattr(tensor, name)
        assert ours.dtype == theirs.dtype
        assert (ours == theirs).all()
    assert (kernels.bitmask_decode(tensor.values, tensor.bitmask, tensor.shape) == matrix).all()


def test_bits_are_those_of_compressed_tensors() -> None:
    torch = pytest.importorskip("torch")
    helpers = pytest.importorskip("compressed_tensors.utils.helpers")
    kept = np.random.default_rng(0).random((5, 37)) < 0.4
    ours = bitmask.encode(kept.astype(np.float32)).bitmask
    assert (helpers.pack_bitmasks(torch.tensor(kept)).numpy() == ours).all()


def test_a_bitmask_that_promises_more_values_is_refused() -> None:
    tensor = bitmask.encode(np.ones((2, 9), np.float32))
    with pytest.raises(ValueError, match="18 bits"):
        kernels.bitmask_decode(tensor.values[:-1], tensor.bitmask, tensor.shape)
    with pytest.raises(ValueError, match="bitmask"):
        kernels.bitmask_decode(tensor.values, tensor.bitmask, (2, 30))


def test_words_of_the_wrong_length_are_refused() -> None:
    with pytest.raises(ValueError, match="packed"):
        kernels.unpack(np.zeros((2, 3), np.int32), 4, 25)
    with pytest.raises(ValueError, match="2 to 8"):
        kernels.unpack(np.zeros((2, 3), np.int32), 9, 8)
