"""Matrices as bytes: what is read computes the same bits, and damaged bytes are refused or harmless."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from penjing import kernels
from penjing.formats.affine import AffineTensor, Grid
from penjing.formats.mxfp4 import Mxfp4Tensor
from penjing.kernels import Matrix, matrix_from, screen_of, stored

HEADER = 128


def affine(rng: np.random.RandomState, rows: int, columns: int, bits: int, group: int, symmetric: bool) -> AffineTensor:
    grid = Grid(bits=bits, group_size=group, symmetric=symmetric)
    weight = rng.normal(0, 1, (rows, columns)).astype(np.float32)
    weight[rng.random_sample(weight.shape) < 0.6] = 0
    return kernels.quantize(weight, grid)


def every_kind() -> dict[str, Matrix]:
    rng = np.random.RandomState(0)  # its numbers are promised to be the same in every version
    made: dict[str, Matrix] = {}
    for rows, columns in ((1, 16), (33, 96), (70, 256)):
        plain = rng.normal(0, 1, (rows, columns)).astype(np.float32)
        plain[rng.random_sample(plain.shape) < 0.5] = 0
        for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
            for sparse in (False, True):
                matrix = matrix_from(plain.astype(dtype), sparse=sparse)
                made[f"{matrix.layout} {rows}×{columns}"] = matrix
        for bits in (2, 3, 4, 8):
            for symmetric in (False, True):
                tensor = affine(rng, rows, columns, bits, 16, symmetric)
                for activations in ("float", "int8-groups"):
                    for sparse in (False, True):
                        matrix = matrix_from(tensor, activations=activations, sparse=sparse)
                        made[f"{matrix.layout} {rows}×{columns} {symmetric}"] = matrix
        row = matrix_from(affine(rng, rows, columns, 8, -1, True), activations="int8")
        made[f"{row.layout} {rows}×{columns}"] = row
    pairs = affine(np.random.RandomState(1), 33, 256, 4, 128, True)
    pairs.codes.reshape(-1, 4)[:, [1, 2]] = 0
    made["two of four"] = matrix_from(pairs, activations="int8-groups", sparse=True)
    made["screen"] = screen_of(made["bfloat16 70×256"])
    blocks = rng.randint(0, 256, (18, 3, 16), np.uint8)
    scales = rng.randint(110, 130, (18, 3), np.uint8)
    made["mxfp4"] = matrix_from(Mxfp4Tensor(blocks, scales), activations="int8-groups")
    made["nothing kept"] = matrix_from(np.zeros((20, 64), np.float32), sparse=True)
    return made


KINDS = every_kind()


def written(path: Path, matrices: list[Matrix]) -> list[tuple[int, int, int]]:
    sections, at = [], 0
    with open(path, "wb") as file:
        for matrix in matrices:
            size, checked = stored.store(matrix, file.fileno())
            sections.append((at, size, checked))
            at += size
    assert path.stat().st_size == at
    return sections


def read(path: Path, sections: list[tuple[int, int, int]]) -> list[Matrix | None]:
    with open(path, "rb") as file:
        return stored.restore(file.fileno(), sections)


def same(a: Matrix, b: Matrix) -> None:
    assert (a.rows, a.columns, a.layout, a.nbytes) == (b.rows, b.columns, b.layout, b.nbytes)
    np.testing.assert_array_equal(a.decode(), b.decode())
    for rows in (1, 5, 40):
        x = np.random.default_rng(rows).normal(0, 1, (rows, a.columns)).astype(np.float32)
        np.testing.assert_array_equal(a(x), b(x))


def test_every_layout_comes_back_and_computes_the_same_bits(tmp_path) -> None:
    sections = written(tmp_path / "all", list(KINDS.values()))
    found = read(tmp_path / "all", sections)
    assert len({matrix.layout for matrix in KINDS.values()}) >= 16
    for name, (before, after) in zip(KINDS, zip(KINDS.values(), found, strict=True), strict=True):
        assert after is not None, name
        same(before, after)


def test_another_layout_has_another_number(tmp_path) -> None:
    """A cache that was written by an older Penjing must not be read as what it is not: count `stored_layout` up when
    this fails, in native/kernels/stored.h, and write the new digest here."""
    written(tmp_path / "all", list(KINDS.values()))
    assert (stored.LAYOUT, hashlib.sha256((tmp_path / "all").read_bytes()).hexdigest()) == (
        3,
        "0ccfd1df0fa2399b468be43ba35775eb44aa5dd4c17bda511a1117b34d79bb6a",
    )


def test_a_matrix_lives_on_without_the_others_and_is_written_again(tmp_path) -> None:
    path = tmp_path / "all"
    sections = written(path, list(KINDS.values()))
    last = read(path, sections)[-2]
    path.unlink()
    assert last is not None
    same(last, KINDS["mxfp4"])
    again = written(tmp_path / "again", [last])
    assert again[0][1:] == sections[-2][1:]


@pytest.mark.parametrize("size", [0, 1, 7, 8, 63, 64, 65, 1 << 20, (1 << 20) + 1, (3 << 20) + 5])
def test_checksums_see_every_change(size) -> None:
    rng = np.random.default_rng(size)
    right = rng.integers(0, 256, size, np.uint8)
    seen = {kernels.checksum(right.tobytes()), kernels.checksum(right.tobytes() + b"\0")}
    for _ in range(40 if size else 0):
        wrong = right.copy()
        for at in rng.integers(0, size, rng.integers(1, 3)):
            wrong[at] ^= np.uint8(1 << rng.integers(0, 8))
        if not np.array_equal(wrong, right):
            seen.add(kernels.checksum(wrong.tobytes()))
            assert kernels.checksum(wrong.tobytes()) != kernels.checksum(right.tobytes())
    assert len(seen) > 1


def test_the_highest_bits_of_two_words_do_not_cancel() -> None:
    """What a sum of products alone would miss: words 64 bytes apart go into the same product."""
    right = bytearray(256)
    wrong = bytearray(256)
    wrong[7], wrong[71] = 128, 128
    assert kernels.checksum(bytes(right)) != kernels.checksum(bytes(wrong))


def test_a_damaged_section_is_none_and_the_others_are_read(tmp_path) -> None:
    path = tmp_path / "three"
    sections = written(path, [KINDS["mxfp4"]] * 3)
    data = bytearray(path.read_bytes())
    data[sections[1][0] + 300] ^= 1
    path.write_bytes(data)
    assert [each is not None for each in read(path, sections)] == [True, False, True]
    path.write_bytes(data[: sections[2][0] + 10])
    assert [each is not None for each in read(path, sections)] == [True, False, False]


def test_bytes_with_a_right_checksum_are_still_not_believed(tmp_path) -> None:
    """Damage in the header and the tables, summed anew: refused, or a matrix that computes within its memory."""
    rng = np.random.default_rng(1)
    path = tmp_path / "one"
    refused = taken = 0
    for matrix in KINDS.values():
        ((_, size, _),) = written(path, [matrix])
        right = path.read_bytes()
        for _ in range(40):
            wrong = bytearray(right)
            for _ in range(rng.integers(1, 4)):
                at = rng.integers(0, HEADER if rng.random() < 0.7 else size)
                wrong[at] = rng.integers(0, 256)
            if rng.random() < 0.2:
                del wrong[64 * rng.integers(0, size // 64) :]
            path.write_bytes(wrong)
            (found,) = read(path, [(0, len(wrong), kernels.checksum(bytes(wrong)))])
            if found is None:
                refused += 1
            else:
                taken += 1
                with np.errstate(all="ignore"):
                    found(np.ones((3, found.columns), np.float32))
                    found.decode(slice(0, 1))
    assert refused > 500
    assert taken > 100


@pytest.mark.parametrize("sections", [[(1, 64, 0)], [(64, 64, 0), (0, 64, 0)], [(0, -64, 0)], [(0, 1 << 50, 0)]])
def test_sections_that_cannot_be(tmp_path, sections) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ValueError, match="sections: give them in order"):
        read(tmp_path / "file", sections)


def test_a_file_that_cannot_be_written(tmp_path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with open(tmp_path / "file", "rb") as file, pytest.raises(OSError, match="Bad file descriptor"):
        stored.store(KINDS["mxfp4"], file.fileno())
    if os.path.exists("/dev/full"):
        with open("/dev/full", "wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
            stored.store(KINDS["mxfp4"], file.fileno())
