"""Held-out text is told from text that was calibrated on, and quality is not measured on the latter."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import penjing
from calibrate_models import make, text
from penjing.errors import BadInput
from penjing.overlap import KEPT, check_held_out, sketch

CHINESE = "".join(chr(sign) for sign in np.random.default_rng(5).integers(0x4E00, 0x9FA5, 300))


def share_by_counting(one: str, other: str) -> float:
    """Of the different runs of eight words of a text, how many the other has."""
    runs = [{tuple(words[i : i + 8]) for i in range(len(words) - 7)} for words in (one.split(), other.split())]
    return len(runs[0] & runs[1]) / len(runs[0])


@pytest.mark.parametrize("size", [300, 20_000], ids=["whole", "sketched"])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.2, 1.0])
def test_the_share_is_about_that_of_all_runs(size: int, share: float) -> None:
    calibrated, common = text(size, seed=1), round(size * share)
    held_out = " ".join([*calibrated.split()[:common], *text(size - common, seed=2).split()])
    found = sketch([calibrated])
    assert len(found) == min(size - 7, KEPT)
    assert found == sorted(found)
    right = share_by_counting(held_out, calibrated)
    if right < 0.1:
        check_held_out([held_out], found, "e.txt")
        return
    with pytest.raises(BadInput, match=r"e.txt: about \d+% of it was calibrated on") as caught:
        check_held_out([held_out], found, "e.txt")
    said = int(str(caught.value).split("about ")[1].split("%")[0]) / 100
    assert said == pytest.approx(right, abs=0.06)


def test_words_that_are_not_written_apart() -> None:
    with pytest.raises(BadInput, match="about 100% of it"):
        check_held_out([CHINESE[20:200]], sketch([CHINESE]), "e.txt")
    check_held_out(["".join(reversed(CHINESE))], sketch([CHINESE]), "e.txt")


def test_quality_is_not_measured_on_calibration_text(tmp_path: Path) -> None:
    make(tmp_path / "model", "llama")
    (tmp_path / "text.txt").write_text(text(600))
    (tmp_path / "other.txt").write_text(text(600, seed=3))
    rows = {"calibration": [tmp_path / "text.txt"], "samples": 10, "sequence_length": 24}
    settings = {"method": "gptq", "bits": 4, "group_size": 16, **rows}
    with pytest.raises(BadInput, match=r"text.txt: about .* was calibrated on") as caught:
        penjing.compress(tmp_path / "model", tmp_path / "out", evaluate=tmp_path / "text.txt", **settings)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    result = penjing.compress(tmp_path / "model", tmp_path / "out", **settings)
    assert "not measured" in str(result)
    with pytest.raises(BadInput, match="was calibrated on"):
        penjing.evaluate(tmp_path / "out", tmp_path / "text.txt", context_length=32)
    measured = penjing.evaluate(tmp_path / "out", tmp_path / "other.txt", context_length=32)
    penjing.evaluate(tmp_path / "model", tmp_path / "text.txt", context_length=32)  # it saw nothing
    again = penjing.compress(tmp_path / "model", tmp_path / "out", evaluate=tmp_path / "other.txt", **settings)
    assert again.already_done
    assert again.evaluation is not None
    assert f"ΔL {again.evaluation['loss_change']:+.4f}" in str(again)
    assert f"KL {again.evaluation['kl']:.5f}" in str(again)
    assert measured.tokens > 0
    assert len(json.loads((tmp_path / "out" / "penjing.json").read_text())["calibrated_text"]) > 0
