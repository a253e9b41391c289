"""Bars of tokens per second, that can be read on a light page and on a dark one."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

INK = "#808080"  # the same distance from white and from black
OURS, THEIRS = "#2f81c7", "#a8a29e"


def draw(panels: Mapping[str, Mapping[str, Sequence[float]]], file: Path, *, wide: bool) -> None:
    """Panels side by side, or one under the other on a narrow page. panels: title → engine → values of the rounds."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    panels = {title: bars for title, bars in panels.items() if bars}
    if not panels:
        return
    rows = max(len(bars) for bars in panels.values())
    height = 0.9 + 0.34 * rows
    size, grid = ((13, height), (1, len(panels))) if wide else ((6, height * len(panels)), (len(panels), 1))
    colours = {"text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK}
    with rc_context({"font.size": 11, "svg.fonttype": "path", "svg.hashsalt": "penjing", **colours}):
        figure = Figure(figsize=size, layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.subplots(*grid, squeeze=False, sharey=wide).flat
        for index, (place, (title, bars)) in enumerate(zip(axes, panels.items(), strict=True)):
            place.patch.set_alpha(0)
            place.set_title(f"{title}, tokens/s", loc="left", fontsize=12, color=INK)
            _bars(place, bars)
            if index == 0 or not wide:
                place.set_yticks(range(len(bars)), list(bars))
                place.invert_yaxis()
        figure.savefig(file, metadata={"Date": None}, bbox_inches="tight", pad_inches=0.1, transparent=True)


def _bars(place, bars: Mapping[str, Sequence[float]]) -> None:  # type: ignore[no-untyped-def]
    most = max(max(values) for values in bars.values())
    place.set_xlim(0, most * 1.18)
    place.set_xticks([])
    place.tick_params(length=0)
    for side in ("top", "right", "bottom", "left"):
        place.spines[side].set_visible(False)
    for row, (name, values) in enumerate(bars.items()):
        middle = statistics.median(values)
        place.barh(row, middle, height=0.62, color=OURS if name.startswith("Penjing") else THEIRS)
        place.plot([min(values), max(values)], [row, row], color=INK, linewidth=1.2)
        place.text(max(values), row, f" {middle:.0f}" if middle >= 10 else f" {middle:.1f}", va="center")
