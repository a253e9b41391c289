"""torch's checkpoints, read without torch, against torch; and pickles that want more than tensors."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from penjing import compress
from penjing.checkpoint import open_checkpoint
from penjing.checkpoint.pickled import PickledFile
from penjing.errors import BadCheckpoint, PenjingError, Unsupported
from penjing.export import export

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny_llama import CONFIG, llama_tensors, make_model

torch = pytest.importorskip("torch")
WAYS = {"zip": True, "before 1.6": False}


def state() -> dict[str, Any]:
    """Every dtype, and tensors that are views: transposed, of the middle, of one number many times."""
    torch.manual_seed(0)
    kinds = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    integers = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
    found = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.LayerNorm(5)).state_dict()
    found |= {str(kind): torch.randn(3, 7).to(kind) for kind in kinds}
    found |= {str(kind): torch.randint(0, 2, (9,)).to(kind) for kind in integers}
    found |= {
        "transposed": torch.randn(4, 6).t(),
        "middle": torch.randn(10, 3)[2:5],
        "every other": torch.randn(9)[::2],
    }
    found |= {"expanded": torch.randn(1, 4).expand(3, 4), "none": torch.zeros(0, 3), "one": torch.tensor(3.5)}
    return found | {"parameter": torch.nn.Parameter(torch.randn(2, 2)), "turned": torch.randn(2, 3, 4).permute(2, 0, 1)}


def as_numpy(tensor: Any) -> Any:
    tensor = tensor.detach()
    return tensor.view(torch.int16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("within", [None, "state_dict", "model"])
def test_every_tensor_is_what_torch_saved(way: str, within: str | None, tmp_path: Path) -> None:
    right, path = state(), tmp_path / "m.bin"
    whole = right if within is None else {within: right, "epoch": 3, "noise": torch.randn(3)}
    torch.save(whole, path, _use_new_zipfile_serialization=WAYS[way])
    with PickledFile(path) as file:
        assert set(file.infos) == set(right)
        for name, tensor in right.items():
            found = file.read(name)
            if tensor.dtype == torch.bfloat16:
                assert file.infos[name].dtype.name == "bfloat16"
                found = found.view(np.int16)
            assert found.dtype == as_numpy(tensor).dtype
            np.testing.assert_array_equal(found, as_numpy(tensor))
            if found.ndim:
                np.testing.assert_array_equal(file.read(name, slice(1, 3)).view(found.dtype), as_numpy(tensor)[1:3])


def loose(array: Any) -> Any:
    bfloat16 = array.dtype.name == "bfloat16"
    return torch.tensor(array.view(np.int16)).view(torch.bfloat16) if bfloat16 else torch.tensor(array)


def save(tensors: dict[str, Any], path: Path) -> None:
    torch.save({name: loose(array) for name, array in tensors.items()}, path)


def test_a_model_in_shards_compresses_to_the_same_bytes(tmp_path: Path) -> None:
    right = compress(make_model(tmp_path / "safe"), tmp_path / "a", "int4", group_size=32)
    folder = tmp_path / "pickled"
    folder.mkdir()
    tensors = llama_tensors()
    names = sorted(tensors)
    shards = {"pytorch_model-00001-of-00002.bin": names[:9], "pytorch_model-00002-of-00002.bin": names[9:]}
    for file, its in shards.items():
        save({name: tensors[name] for name in its}, folder / file)
    places = {name: file for file, its in shards.items() for name in its}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    torch.save({"step": 3}, folder / "training_args.bin")
    assert compress(folder, tmp_path / "b", "int4", group_size=32).digest == right.digest
    places["lm_head.weight"] = "pytorch_model-00002-of-00002.bin"
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(BadCheckpoint, match=r"lm_head.weight is missing; pytorch_model.bin.index.json says"):
        open_checkpoint(folder)


def test_exported_it_is_safetensors(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    save(llama_tensors(), tmp_path / "pytorch_model.bin")
    export(tmp_path, tmp_path / "out")
    found = open_checkpoint(tmp_path / "out")
    assert found.weight_files == ["model.safetensors"]
    for name, array in llama_tensors().items():
        np.testing.assert_array_equal(found.tensor(name), array)


def test_reading_needs_no_torch(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    save(llama_tensors(), tmp_path / "model.pt")
    program = (
        "import sys; sys.modules['torch'] = None; from penjing.models import load; from penjing.checkpoint import *;"
        "load(sys.argv[1]); print(len(open_checkpoint(sys.argv[1]).names))"
    )
    child = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    assert int(child.stdout) == len(llama_tensors())


class _Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch owned",)


def test_a_pickle_that_runs_something_is_refused_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for value, name in ((_Evil(), "posix.system"), (torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear")):
        torch.save({"a": torch.ones(2), "b": value}, "m.bin")
        with pytest.raises(Unsupported, match=f"m.bin: needs more than tensors \\({name}\\)") as caught:
            PickledFile("m.bin")
        assert "\n" not in str(caught.value)
    assert not Path("owned").exists()


def test_what_is_no_checkpoint_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "m.bin"
    for value in ([torch.ones(2)], {"a": 1}, torch.ones(2)):
        torch.save(value, path)
        with pytest.raises(BadCheckpoint, match="holds no dictionary of name → tensor"):
            PickledFile(path)
    for raw in (b"", b"hello", pickle.dumps({"a": 1})):
        path.write_bytes(raw)
        with pytest.raises(BadCheckpoint, match="no checkpoint of torch's"):
            PickledFile(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme", "no")
    with pytest.raises(BadCheckpoint, match=r"without torch's data\.pkl"):
        PickledFile(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("m/data.pkl", b"\x80\x02}.")
    with pytest.raises(Unsupported, match="is compressed"):
        PickledFile(path)


@pytest.mark.parametrize("way", WAYS)
def test_damage_is_refused_or_read_and_never_anything_else(way: str, tmp_path: Path) -> None:
    path = tmp_path / "m.bin"
    torch.save(state(), path, _use_new_zipfile_serialization=WAYS[way])
    whole, random = path.read_bytes(), np.random.default_rng(0)
    refused: list[str] = []
    for _ in range(150):
        raw = bytearray(whole)
        if random.random() < 0.2:
            raw = raw[: random.integers(len(raw))]
        else:
            for place in random.integers(0, 3000, 2):
                raw[place] = random.integers(256)
        path.write_bytes(raw)
        try:
            with PickledFile(path) as file:
                for name in file.infos:
                    file.read(name)
        except PenjingError as error:
            refused.append(str(error))
    assert len(refused) > 30
    assert not any("\n" in message for message in refused)
