"""The reader and the writer, against the safetensors library and against damaged files."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from penjing.checkpoint.safetensors import Chunks, SafetensorsFile, read_safetensors, sha256_of, write_safetensors
from penjing.errors import BadCheckpoint

safetensors_numpy = pytest.importorskip("safetensors.numpy")

DTYPES = [np.float64, np.float32, np.float16, np.int64, np.int32, np.int16, np.int8, np.uint8, np.bool_]


def some_tensors() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    shapes = [(3, 5), (7,), (), (0, 4), (2, 3, 4), (1, 1), (9, 2), (5,), (8,)]
    return {
        f"t{index}": np.asarray(random.standard_normal(shape) * 50, np.float64).astype(dtype, copy=False)
        for index, (dtype, shape) in enumerate(zip(DTYPES, shapes, strict=True))
    }


def test_library_reads_what_we_write(tmp_path: Path) -> None:
    tensors = some_tensors()
    digest, length = write_safetensors(tmp_path / "a.safetensors", tensors, {"format": "pt"})
    raw = (tmp_path / "a.safetensors").read_bytes()
    assert (digest, length) == (hashlib.sha256(raw).hexdigest(), len(raw))
    back = safetensors_numpy.load(raw)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype
        np.testing.assert_array_equal(back[name], tensor)


def test_we_read_what_the_library_writes(tmp_path: Path) -> None:
    tensors = some_tensors()
    safetensors_numpy.save_file(tensors, tmp_path / "a.safetensors", {"who": "library"})
    back, metadata = read_safetensors(tmp_path / "a.safetensors")
    assert metadata == {"who": "library"}
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype
        np.testing.assert_array_equal(back[name], tensor)


def test_bfloat16_against_torch(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    save_file = pytest.importorskip("safetensors.torch").save_file
    tensor = torch.randn(4, 6, dtype=torch.bfloat16)
    save_file({"w": tensor}, tmp_path / "a.safetensors")
    with SafetensorsFile(tmp_path / "a.safetensors") as file:
        back = file.read("w")
        rows = file.read("w", slice(1, 3))
    assert back.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(back.astype(np.float32), tensor.float().numpy())
    np.testing.assert_array_equal(rows.astype(np.float32), tensor[1:3].float().numpy())


def test_parts_write_the_same_bytes_as_the_whole(tmp_path: Path) -> None:
    matrix = np.random.default_rng(1).standard_normal((10, 3)).astype(np.float32)
    write_safetensors(tmp_path / "whole", {"w": matrix})
    parts = (matrix[low : low + 4] for low in range(0, 10, 4))
    write_safetensors(tmp_path / "parts", {"w": Chunks(matrix.dtype, matrix.shape, parts)})
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "parts").read_bytes()
    assert sha256_of(tmp_path / "whole") == hashlib.sha256((tmp_path / "whole").read_bytes()).hexdigest()


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"w": np.ones(3, np.float32)})
    before = path.read_bytes()
    with pytest.raises(ValueError, match="tensor w: 8 bytes came, its shape needs 12"):
        write_safetensors(path, {"w": Chunks(np.dtype(np.float32), (3,), [np.ones(2, np.float32)])})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def raw_file(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


GOOD = entry("F32", [2, 2], 0, 16)
DAMAGED = {
    "empty": (b"", "0 bytes"),
    "length beyond the file": (struct.pack("<Q", 1 << 40) + b"{}", "truncated, or not safetensors"),
    "not JSON": (raw_file(b"\xff\xfe{"), "header is not JSON"),
    "without end": (raw_file(b"[" * 200_000), "nested too deeply"),
    "a name of two lines": (raw_file({"w\nv": {"shape": [1]}}), r"tensor w\\nv: needs dtype"),
    "not an object": (raw_file([1]), "not an object"),
    "a name twice": (raw_file(b'{"w": {}, "w": {}}'), "'w' is in the header twice"),
    "no dtype": (raw_file({"w": {"shape": [1]}}), "tensor w: needs dtype"),
    "unknown dtype": (raw_file({"w": entry("F7", [2], 0, 8)}, b" " * 8), "tensor w: dtype 'F7' cannot be read"),
    "negative shape": (raw_file({"w": entry("F32", [-2, 2], 0, 16)}, b" " * 16), "tensor w: shape"),
    "boolean shape": (raw_file({"w": {**GOOD, "shape": [True, 4]}}, b" " * 16), "tensor w: shape"),
    "backward offsets": (raw_file({"w": entry("F32", [2, 2], 16, 0)}, b" " * 16), "tensor w: shape"),
    "wrong size": (raw_file({"w": entry("F32", [2, 3], 0, 16)}, b" " * 16), "takes 24 bytes, its place has 16"),
    "wrong dtype": (raw_file({"w": entry("F16", [2, 2], 0, 16)}, b" " * 16), "takes 8 bytes, its place has 16"),
    "overlap": (raw_file({"v": GOOD, "w": entry("F32", [2], 8, 16)}, b" " * 16), "tensor w overlaps"),
    "hole": (raw_file({"w": entry("F32", [2, 2], 4, 20)}, b" " * 20), "tensor w leaves a hole"),
    "truncated": (raw_file({"w": GOOD}, b" " * 15), "truncated: tensor w"),
    "left over": (raw_file({"w": GOOD}, b" " * 17), "1 bytes after the last tensor"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files_are_refused_by_name(case: str, tmp_path: Path) -> None:
    raw, message = DAMAGED[case]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(raw)
    with pytest.raises(BadCheckpoint, match=message) as caught:
        SafetensorsFile(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_truncation_of_a_good_file_is_refused(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "good", {"w": np.arange(6, dtype=np.float32), "b": np.ones(3, np.int8)})
    raw = (tmp_path / "good").read_bytes()
    for length in range(len(raw)):
        (tmp_path / "cut").write_bytes(raw[:length])
        with pytest.raises(BadCheckpoint):
            SafetensorsFile(tmp_path / "cut")
