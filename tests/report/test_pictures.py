"""What the picture says is read back from the figure's own text; its look is for eyes."""

from __future__ import annotations

from pathlib import Path

import pytest

from penjing.report.pictures import Variant, size_and_loss

pytest.importorskip("matplotlib")

VARIANTS = [
    Variant("original", 22_000_000),
    Variant("int4", 6_600_000, 0.044, (0.041, 0.047)),
    Variant("better by chance", 5_000_000, -0.01, (-0.03, 0.01)),
]


def test_png(tmp_path: Path) -> None:
    size_and_loss(VARIANTS, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_svg_is_the_same_bytes_each_time(tmp_path: Path) -> None:
    for name in ("a.svg", "b.svg"):
        size_and_loss(VARIANTS, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_numbers_and_their_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    kept = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: kept.append(figure))
    size_and_loss(VARIANTS, tmp_path / "picture.png")
    size, loss = kept[0].axes
    assert [bar.get_width() for bar in size.patches] == [22.0, 6.6, 5.0]
    assert [text.get_text().split() for text in size.texts] == [["22.0"], ["6.6", "(30", "%)"], ["5.0", "(23", "%)"]]
    assert [text.get_text() for text in loss.texts] == ["0", "+0.044 ± 0.003", "-0.010 ± 0.020"]
    low, high = loss.get_xlim()
    assert low < -0.03
    assert high > 0.047
