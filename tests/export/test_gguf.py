"""Models written as GGUF and read back."""

from __future__ import annotations

import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from penjing import compress
from penjing.checkpoint import open_checkpoint
from penjing.checkpoint.gguf.file import Written, write_gguf
from penjing.errors import BadCheckpoint, BadInput, Unsupported
from penjing.export import export
from penjing.formats import ggml
from penjing.formats.affine import AffineTensor
from penjing.models.tokenizer import Tokenizer
from penjing.serve.service import _fingerprint

NOVELIST = Path(__file__).parents[2] / "examples" / "novelist"
TEXT = "It was 1813,\n\tand Mr. Bennet's daughters — née Gardiner — said: 你好!"


def test_auto_gives_back_every_tensor_and_token(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    assert not export(NOVELIST, file, "gguf").notes
    first, again = open_checkpoint(NOVELIST), open_checkpoint(file)
    assert set(first.names) == set(again.names)
    for name in first.names:
        np.testing.assert_array_equal(again.tensor(name).astype(np.float32), first.tensor(name).astype(np.float32))
    assert Tokenizer(file).encode(TEXT) == Tokenizer(NOVELIST).encode(TEXT)


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 64), (8, 32), (8, -1)])
def test_symmetric_grids_keep_their_integers(bits: int, group: int, tmp_path: Path) -> None:
    made = compress(NOVELIST, tmp_path / "c", bits=bits, group_size=group, symmetric=True, check="none").output
    assert not export(made, tmp_path / "c.gguf", "gguf").notes
    first, again = open_checkpoint(made), open_checkpoint(tmp_path / "c.gguf")
    for name in ("self_attn.k_proj", "mlp.down_proj"):
        before, after = (each.weight(f"model.layers.3.{name}") for each in (first, again))
        assert isinstance(before, AffineTensor)
        assert isinstance(after, AffineTensor)
        np.testing.assert_array_equal(after.codes, before.codes)
        np.testing.assert_array_equal(after.decode(), before.decode())


def test_zeros_stay_zeros_and_are_said_to_be_dense(tmp_path: Path) -> None:
    made = compress(NOVELIST, tmp_path / "c", "int4-sparse50", group_size=32, check="none").output
    found = export(made, tmp_path / "c.gguf", "gguf")
    assert "50% of the compressed weights are zeros, written as zeros: llama.cpp" in found.notes[0]
    first, again = open_checkpoint(made), open_checkpoint(tmp_path / "c.gguf")
    name = "model.layers.3.mlp.down_proj.weight"
    np.testing.assert_array_equal(again.tensor(name), first.tensor(name))


def test_another_grid_is_said_to_be_rounded_again(tmp_path: Path) -> None:
    made = compress(NOVELIST, tmp_path / "c", bits=4, group_size=16, symmetric=True, check="none").output
    assert "rounded again" in export(made, tmp_path / "c.gguf", "gguf").notes[0]


def test_what_is_cut_off_or_unknown_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    export(NOVELIST, file, "gguf", "q8_0")
    whole = file.read_bytes()
    for length in (3, 20, 5000, len(whole) - 100):
        file.write_bytes(whole[:length])
        with pytest.raises(BadCheckpoint, match=r"m\.gguf"):
            open_checkpoint(file)
    file.write_bytes(whole.replace(b"\5\0\0\0\0\0\0\0llama", b"\5\0\0\0\0\0\0\0lluma", 1))
    with pytest.raises(Unsupported, match="lluma"):
        open_checkpoint(file)
    file.write_bytes(b"hello")
    with pytest.raises(BadCheckpoint, match="not a GGUF file"):
        open_checkpoint(file)
    with pytest.raises(Unsupported, match="q9"):
        export(NOVELIST, tmp_path / "n.gguf", "gguf", "q9")
    with pytest.raises(BadInput, match="is there"):
        export(NOVELIST, file, "gguf")


def one_key(key: bytes, rest: bytes, size: int = 100) -> bytes:
    """A file with one key and no tensor: what follows the key, then zeros up to its size."""
    return (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, len(key)) + key + rest).ljust(size, b"\0")


HOSTILE = {
    "keys that cannot be there": (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60), "cannot be in 24 bytes"),
    "tensors that cannot be there": (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0), "cannot be in 24 bytes"),
    "more bytes than numbers can say": (one_key(b"k", struct.pack("<IIQ", 9, 10, (1 << 64) - 1)), "beyond the end"),
    "more texts than bytes": (one_key(b"k", struct.pack("<IIQ", 9, 8, 1 << 63)), "beyond the end"),
    "a text longer than the file": (one_key(b"k", struct.pack("<IQ", 8, 1 << 40)), "key k goes beyond the end"),
    "an empty tensor": (
        b"GGUF" + struct.pack("<IQQQ1sIQQIQ", 3, 1, 0, 1, b"t", 2, 32, 0, 2, 0),
        r"tensor t has shape \(0, 32\)",
    ),
    "lists in lists": (one_key(b"k", struct.pack("<IIQ", 9, 9, 1)), "has type 9"),
    "two lines in a name": (one_key(b"k\nl", struct.pack("<I", 99)), r"key k\\nl has type 99"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers_are_one_line(case: str, tmp_path: Path) -> None:
    raw, message = HOSTILE[case]
    (tmp_path / "m.gguf").write_bytes(raw)
    with pytest.raises(BadCheckpoint, match=message) as caught:
        open_checkpoint(tmp_path / "m.gguf")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("llama.attention.head_count", 0, "head_count = 0, expected a whole number from 1 on"),
        ("llama.attention.head_count_kv", "four", "head_count_kv = 'four', expected a whole number"),
        ("llama.embedding_length", True, "embedding_length = True, expected a whole number"),
        ("tokenizer.ggml.eos_token_id", ["a"], "expected the number of a token"),
    ],
)
def test_keys_that_make_no_sense_are_named(key: str, value: object, message: str, tmp_path: Path) -> None:
    tensors = [Written("token_embd.weight", ggml.KINDS["f32"], (4, 32), [np.zeros(512, np.uint8)])]
    keys = {f"llama.{name}": 2 for name in ("attention.head_count", "block_count", "feed_forward_length")}
    keys |= {"general.architecture": "llama", "llama.embedding_length": 32, "llama.context_length": 8}
    write_gguf(tmp_path / "m.gguf", keys, tensors)
    open_checkpoint(tmp_path / "m.gguf")
    write_gguf(tmp_path / "m.gguf", keys | {key: value}, tensors)
    with pytest.raises(BadCheckpoint, match=message):
        open_checkpoint(tmp_path / "m.gguf")


@pytest.mark.parametrize(("name", "kind"), [("rope_freqs.weight", "q8_0"), ("rope_factors_short.weight", "f32")])
def test_rotary_factors_that_cannot_be_read_are_named(name: str, kind: str, tmp_path: Path) -> None:
    tensors = [Written("token_embd.weight", ggml.KINDS["f32"], (4, 32), [np.zeros(512, np.uint8)])]
    size = ggml.KINDS[kind].row_bytes(32)
    tensors.append(Written(name, ggml.KINDS[kind], (32,), [np.zeros(size, np.uint8)]))
    keys = {f"llama.{each}": 2 for each in ("attention.head_count", "block_count", "feed_forward_length")}
    keys |= {"general.architecture": "llama", "llama.embedding_length": 32, "llama.context_length": 8}
    write_gguf(tmp_path / "m.gguf", keys, tensors)
    with pytest.raises(
        BadCheckpoint, match="expected F32" if kind == "q8_0" else "rope_factors_long.weight is missing"
    ):
        open_checkpoint(tmp_path / "m.gguf")


def test_a_header_as_long_as_the_memory_is_not_read(tmp_path: Path) -> None:
    """Of a file that takes no room on the disk."""
    with open(tmp_path / "m.gguf", "wb") as file:
        file.write(one_key(b"k", struct.pack("<IIQ", 9, 0, 1 << 40)))
        file.truncate(1 << 41)
    with pytest.raises(BadCheckpoint, match="bytes of header: damaged"):
        open_checkpoint(tmp_path / "m.gguf")


def test_the_commands_take_a_file(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    export(NOVELIST, file, "gguf", "q4_k")

    def run(*words: str, said: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "penjing", *words], input=said, capture_output=True, text=True, check=True
        )

    inspected = run("inspect", str(file))
    assert "GGUF" in inspected.stdout
    assert inspected.stderr.count("Q4_K are put on int8") == 1
    answers = [run("chat", str(file), "--temperature", "0", "--max-tokens", "8", said="It was\n") for _ in range(2)]
    assert answers[0].stdout == answers[1].stdout != "\n"  # the second finds packed weights in the cache
    run("compress", str(file), "-o", str(tmp_path / "c"), "--bits", "4", "--group-size", "64")
    assert open_checkpoint(tmp_path / "c").is_compressed("model.layers.0.mlp.down_proj")
    assert Tokenizer(tmp_path / "c").encode(TEXT) == Tokenizer(NOVELIST).encode(TEXT)


def test_the_service_takes_a_file(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    export(NOVELIST, file, "gguf", "q8_0")
    first = _fingerprint(str(file))
    file.unlink()
    export(NOVELIST, file, "gguf", "q4_0")
    assert _fingerprint(str(file)) != first


def test_a_grid_with_zero_points_keeps_its_integers_in_q4_1(tmp_path: Path) -> None:
    made = compress(NOVELIST, tmp_path / "c", bits=4, group_size=32, symmetric=False, check="none").output
    export(made, tmp_path / "c.gguf", "gguf")
    before, after = (open_checkpoint(each).weight("model.layers.3.mlp.up_proj") for each in (made, tmp_path / "c.gguf"))
    assert isinstance(before, AffineTensor)
    assert isinstance(after, AffineTensor)
    assert after.grid.bits == 4
    np.testing.assert_array_equal(after.decode(), before.decode())


@pytest.mark.parametrize("kind", ["q4_k", "q5_k", "q6_k", "q4_1"])
def test_weights_for_the_engine_are_near_what_the_file_says(kind: str, tmp_path: Path) -> None:
    export(NOVELIST, tmp_path / "m.gguf", "gguf", kind)
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    exact = checkpoint.tensor("model.layers.2.mlp.down_proj.weight")
    weight = checkpoint.weight("model.layers.2.mlp.down_proj")
    assert isinstance(weight, AffineTensor)
    away = np.sqrt(np.square(weight.decode() - exact).sum() / np.square(exact).sum())
    assert away == 0 if kind == "q6_k" else 0 < away < 0.007
    assert bool(checkpoint.notes) == (kind != "q6_k")


def test_one_matrix_is_in_memory_at_a_time(tmp_path: Path) -> None:
    tracemalloc.start()
    try:
        export(NOVELIST, tmp_path / "m.gguf", "gguf", "f32")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 0.75 * (tmp_path / "m.gguf").stat().st_size  # its largest matrix is a quarter, beside the tokenizer


def test_calibration_on_a_file_is_refused(tmp_path: Path) -> None:
    export(NOVELIST, tmp_path / "m.gguf", "gguf")
    text = NOVELIST / "evaluation.txt"
    with pytest.raises(Unsupported, match="needs a model's folder"):
        compress(tmp_path / "m.gguf", tmp_path / "c", method="gptq", bits=4, group_size=64, calibration=[text])
