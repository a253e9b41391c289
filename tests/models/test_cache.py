"""The file of packed weights: used when it is right, and only then; whatever happens to it, the model computes."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from penjing import models
from penjing.checkpoint import open_checkpoint
from penjing.cli import main
from penjing.engine.messages import Load
from penjing.engine.process import load
from penjing.models import cache as caching
from penjing.models.step import Chunk
from tiny_llama import llama_tensors, make_model

HOME = Path(__file__).parents[2] / "src"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A model, and a cache that takes it although it is small."""
    monkeypatch.setenv("PENJING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(caching, "SMALLEST", 0)
    return make_model(tmp_path / "model")


def logits(model: models.Model) -> np.ndarray:
    model.reserve(2, "float32")
    (found,) = model.logits([Chunk(np.array([1, 2, 3], np.int32), 0, np.array([0], np.int32))])
    return found


def packed(folder: Path) -> np.ndarray:
    return logits(models.load(folder))


def cached(folder: Path) -> np.ndarray:
    return logits(models.load(folder, cache=True))


def file_of(folder: Path) -> Path:
    (found,) = (folder.parent / "cache").iterdir()
    return found


def hit(folder: Path) -> bool:
    cache = caching.weight_cache(checked(folder), "auto")
    return cache is not None and cache.hit


def checked(folder: Path):
    checkpoint = open_checkpoint(folder)
    models.read_config(checkpoint)
    return checkpoint


def test_the_second_start_reads_no_weights_and_computes_the_same(folder, monkeypatch) -> None:
    expected = packed(folder)
    np.testing.assert_array_equal(cached(folder), expected)
    written = file_of(folder)
    before = (written.stat().st_ino, written.read_bytes())
    monkeypatch.setattr("penjing.models.weights.read_weight", None)
    monkeypatch.setattr("penjing.models.weights.make_matrix", None)
    np.testing.assert_array_equal(cached(folder), expected)
    assert (file_of(folder).stat().st_ino, file_of(folder).read_bytes()) == before


def test_the_folder_is_the_owners_alone_and_the_file_too(folder) -> None:
    cached(folder)
    assert file_of(folder).stat().st_mode & 0o777 == 0o600
    assert file_of(folder).parent.stat().st_mode & 0o777 == 0o700


def test_small_models_and_other_callers_keep_none(folder, monkeypatch, tmp_path) -> None:
    packed(folder)
    monkeypatch.setattr(caching, "SMALLEST", 1 << 30)
    cached(folder)
    assert not (tmp_path / "cache").exists()


def test_where_it_is(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("PENJING_CACHE", "/there")
    assert caching.cache_folder() == Path("/there")
    monkeypatch.delenv("PENJING_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert caching.cache_folder() == tmp_path / "penjing"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert caching.cache_folder() == Path("/home/somebody/.cache/penjing")


def change_weight(folder: Path) -> None:
    tensors = llama_tensors()
    tensors["lm_head.weight"] = (tensors["lm_head.weight"].astype(np.float32) * 2).astype(ml_dtypes.bfloat16)
    shutil.rmtree(folder)
    make_model(folder, tensors)


def touch(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        os.utime(file, ns=(1, 1))


def change_config(folder: Path) -> None:
    config = folder / "config.json"
    config.write_text(config.read_text() + "\n")


@pytest.mark.parametrize("change", [change_weight, touch, change_config])
def test_a_model_that_changed_is_packed_anew(folder, change, caplog) -> None:
    cached(folder)
    assert hit(folder)
    change(folder)
    assert not hit(folder)
    caplog.set_level(logging.INFO)
    np.testing.assert_array_equal(cached(folder), packed(folder))
    assert "of another state of the model" in caplog.text
    assert hit(folder)


@pytest.mark.parametrize("name", ["__version__", "stored.LAYOUT"])
def test_another_version_packs_anew(folder, name, monkeypatch) -> None:
    cached(folder)
    monkeypatch.setattr(f"penjing.models.cache.{name}", "another")
    assert not hit(folder)


def test_activations_have_a_file_each(folder, tmp_path) -> None:
    models.load(folder, cache=True)
    models.load(folder, cache=True, activations="float")
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_a_file_of_nobody_knows_where_is_no_trouble_to_others(folder, tmp_path) -> None:
    body = b'{"identity":{},"sections":[]}'
    end = caching._END.pack(caching.MAGIC, caching.FORMAT, 0, 0, len(body), caching.checksum(body))
    (tmp_path / "cache").mkdir()
    strange = tmp_path / "cache" / "strange.weights"
    strange.write_bytes(body + end)
    np.testing.assert_array_equal(cached(folder), packed(folder))
    assert hit(folder)


def test_an_index_longer_than_any_is_not_read(folder) -> None:
    cached(folder)
    path, length = file_of(folder), caching.MAX_INDEX_BYTES + 1
    with open(path, "wb") as file:
        file.seek(length)
        file.write(caching._END.pack(caching.MAGIC, caching.FORMAT, 0, 0, length, 0))
    with open(path, "rb") as file, pytest.raises(caching.DamagedCache, match="not where it should be"):
        caching.read_index(file.fileno())


def test_whatever_byte_is_damaged_the_model_computes_the_same(folder, caplog) -> None:
    expected = cached(folder)
    path, right = file_of(folder), file_of(folder).read_bytes()
    rng = np.random.default_rng(0)
    tail = len(right) - len(right) // 20
    for turn in range(60):
        wrong = bytearray(right)
        kind = turn % 4
        if kind == 0:
            wrong[rng.integers(0, len(wrong))] ^= 1 << rng.integers(0, 8)
        elif kind == 1:  # the index, and where it is
            for _ in range(3):
                wrong[rng.integers(tail, len(wrong))] = rng.integers(0, 256)
        elif kind == 2:
            del wrong[rng.integers(0, len(wrong)) :]
        else:
            wrong += bytes(rng.integers(0, 256, 50, np.uint8))
        path.write_bytes(wrong)
        caplog.clear()
        np.testing.assert_array_equal(cached(folder), expected)
        assert bytes(wrong) == right or "damaged" in caplog.text
        assert path.read_bytes() == right


def test_an_index_that_lies_with_a_right_checksum(folder) -> None:
    expected = cached(folder)
    path, right = file_of(folder), file_of(folder).read_bytes()
    start = caching._END.unpack(right[-caching._END.size :])[3]
    index = caching.msgspec.json.decode(right[start : -caching._END.size], type=caching.Index)
    lies = [
        [],
        index.sections[:-1],
        [("x", *each[1:]) for each in index.sections],
        [("another", *index.sections[0][1:]), *index.sections[1:]],
        [(name, at, size + 64, sum) for name, at, size, sum in index.sections],
        [(name, at, size, -1) for name, at, size, sum in index.sections],
        [(name, at, 1 << 60, sum) for name, at, size, sum in index.sections],
    ]
    for sections in lies:
        body = caching.msgspec.json.encode(caching.Index(index.identity, sections))
        end = caching._END.pack(caching.MAGIC, caching.FORMAT, 0, start, len(body), caching.checksum(body))
        path.write_bytes(right[:start] + body + end)
        np.testing.assert_array_equal(cached(folder), expected)
        np.testing.assert_array_equal(cached(folder), expected)
        assert path.read_bytes() == right


def test_a_letter_of_the_index_is_damage_not_another_model(folder, caplog) -> None:
    expected = cached(folder)
    path, right = file_of(folder), file_of(folder).read_bytes()
    at = right.rindex(b"lm_head")
    path.write_bytes(right[:at] + b"L" + right[at + 1 :])
    np.testing.assert_array_equal(cached(folder), expected)
    assert "its index is not what was written" in caplog.text


def test_a_matrix_of_another_shape_is_not_taken(folder) -> None:
    cached(folder)
    built = models.load(folder).embedding
    shape = (built.rows, built.columns)
    name = models.read_config(checked(folder)).embedding
    cache = caching.weight_cache(checked(folder), "auto")
    assert cache is not None
    assert cache.matrix(name, (shape[0] + 1, shape[1]), lambda: built) is built
    cache = caching.weight_cache(checked(folder), "auto")
    assert cache is not None
    assert cache.matrix(name, shape, lambda: built) is not built


def test_there_is_no_home(folder, monkeypatch, caplog) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("PENJING_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(caching.Path, "home", nowhere)
    np.testing.assert_array_equal(cached(folder), packed(folder))
    assert "set PENJING_CACHE" in caplog.text


@pytest.mark.parametrize("what", ["folder", "full", "room", "replace"])
def test_where_nothing_can_be_written_the_weights_stay_in_memory(folder, what, tmp_path, monkeypatch, caplog) -> None:
    def full(*_: object) -> tuple[int, int]:
        raise OSError(28, "No space left on device")

    if what == "folder":
        (tmp_path / "cache").write_text("in the way")
    elif what == "full":
        monkeypatch.setattr(caching.stored, "store", full)
    elif what == "room":
        monkeypatch.setattr(caching.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    else:
        monkeypatch.setattr(caching.os, "replace", full)
    np.testing.assert_array_equal(cached(folder), packed(folder))
    assert len(caplog.records) == 1
    assert "\n" not in caplog.text.strip()
    if what != "folder":
        assert list((tmp_path / "cache").iterdir()) == []


def test_a_model_that_cannot_be_loaded_leaves_nothing(folder, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("penjing.models.model.load_final_norm", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        models.load(folder, cache=True)
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_file_of_a_model_that_is_gone_is_removed(folder, tmp_path) -> None:
    cached(folder)
    gone = file_of(folder)
    other = make_model(tmp_path / "other")
    cached(other)
    assert gone.exists()
    shutil.rmtree(folder)
    third = make_model(tmp_path / "third")
    cached(third)
    assert not gone.exists()
    assert hit(other)
    assert hit(third)


def test_the_engine_says_where_its_weights_came_from(folder) -> None:
    settings = Load(folder=str(folder), max_num_seqs=1, weight_cache=True)
    assert [load(settings)[1].from_cache for _ in range(2)] == [False, True]
    assert not load(Load(folder=str(folder), max_num_seqs=1))[1].from_cache


def run(program: list[str]) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        main(program)


@pytest.mark.parametrize(("options", "files"), [([], 1), (["--no-weight-cache"], 0)])
def test_commands_keep_packed_weights_unless_told_not_to(folder, options, files, capsys) -> None:
    program = ["bench", str(folder), "--runs", "1", "--decode-tokens", "2", "--json", *options]
    found = []
    for _ in range(2):
        run(program)
        found.append(json.loads(capsys.readouterr().out)["loaded_from_cache"])
    assert found == [False, files == 1]
    run(["doctor", "--json"])
    kept = json.loads(capsys.readouterr().out)["weight_cache"]
    assert kept["files"] == files
    assert kept["folder"] == os.environ["PENJING_CACHE"]
    assert (kept["bytes"] > 0) == (files == 1)


SCRIPT = """
import sys, time
from penjing import models
from penjing.models import cache
cache.SMALLEST = 0
if sys.argv[2] == "slow":
    store = cache.stored.store
    def slow(*arguments):
        print("writing", flush=True)
        time.sleep(0.2)
        return store(*arguments)
    cache.stored.store = slow
models.load(sys.argv[1], cache=True)
"""


def start(folder: Path, how: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HOME), *sys.path])}
    command = [sys.executable, "-c", SCRIPT, str(folder), how]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def test_a_writer_that_is_killed_leaves_what_the_next_removes(folder, tmp_path) -> None:
    writer = start(folder, "slow")
    assert writer.stdout is not None
    for _ in range(3):
        assert writer.stdout.readline() == "writing\n"
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    writer.stdout.close()
    (left,) = (tmp_path / "cache").iterdir()
    assert left.name.endswith(".partial")
    np.testing.assert_array_equal(cached(folder), packed(folder))
    assert file_of(folder).suffix == ".weights"
    assert hit(folder)


def test_a_writer_at_work_is_left_alone(folder, tmp_path) -> None:
    writer = start(folder, "slow")
    assert writer.stdout is not None
    assert writer.stdout.readline() == "writing\n"
    cached(folder)
    assert len(list((tmp_path / "cache").iterdir())) == 2
    assert writer.wait(60) == 0
    writer.stdout.close()
    assert hit(folder)


def test_many_starts_at_once(folder) -> None:
    writers = [start(folder, "fast") for _ in range(4)]
    deadline = time.monotonic() + 120
    for writer in writers:
        assert writer.wait(deadline - time.monotonic()) == 0
        assert writer.stdout is not None
        writer.stdout.close()
    assert hit(folder)
    np.testing.assert_array_equal(cached(folder), packed(folder))
