"""Pictures of what a compression cost and what it gained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, BLUE, ORANGE, RULE = "#24292f", "#0072b2", "#d55e00", "#c8ccd0"  # blue and vermilion differ for every eye


@dataclass(frozen=True)
class Variant:
    """One model of a comparison. Sizes in bytes, loss in nats; the original has no change."""

    name: str
    size_bytes: int
    loss_change: float = 0.0
    loss_change_ci95: tuple[float, float] | None = None


def size_and_loss(variants: Sequence[Variant], file: Path) -> None:
    """Draw size and change of loss side by side, one row a variant; the suffix of `file` chooses PNG or SVG.

    Raises ImportError where matplotlib is missing.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"font.size": 15, "svg.fonttype": "path", "svg.hashsalt": "penjing", "text.color": INK}):
        figure = Figure(figsize=(10, 1.25 + 0.75 * len(variants)), layout="constrained")
        size, loss = figure.subplots(1, 2, sharey=True)
        _bars(size, variants)
        _intervals(loss, variants)
        size.set_yticks(range(len(variants)), [variant.name for variant in variants])
        size.invert_yaxis()
        metadata = {"Date": None} if file.suffix == ".svg" else {}
        figure.savefig(file, dpi=150, metadata=metadata, bbox_inches="tight", pad_inches=0.2)


def _bars(axes: Axes, variants: Sequence[Variant]) -> None:
    _prepare(axes, "weights on disk, MB")
    axes.spines["bottom"].set_visible(False)
    axes.set_xticks([])
    largest = max(variant.size_bytes for variant in variants)
    axes.set_xlim(0, largest * 1.4 / 1e6)
    for row, variant in enumerate(variants):
        axes.barh(row, variant.size_bytes / 1e6, height=0.55, color=BLUE)
        share = f"  ({100 * variant.size_bytes / largest:.0f} %)" if variant.size_bytes < largest else ""
        axes.text(variant.size_bytes / 1e6, row, f" {variant.size_bytes / 1e6:.1f}{share}", va="center")


def _intervals(axes: Axes, variants: Sequence[Variant]) -> None:
    _prepare(axes, "change of loss ΔL, nats ± 95 %")
    axes.axvline(0, color=RULE, linewidth=1.5, zorder=0)
    ends = [0.0, *(end for variant in variants for end in variant.loss_change_ci95 or (variant.loss_change,))]
    span = max(ends) - min(ends) or 1.0
    axes.set_xlim(min(ends) - 0.05 * span, max(ends) + 0.75 * span)  # the right part is for the labels
    axes.locator_params(axis="x", nbins=4)
    for row, variant in enumerate(variants):
        end, label = variant.loss_change, "0"
        if interval := variant.loss_change_ci95:
            axes.plot(interval, [row, row], "-|", color=ORANGE, linewidth=2.5, markersize=16, markeredgewidth=2.5)
            end, label = interval[1], f"{variant.loss_change:+.3f} ± {(interval[1] - interval[0]) / 2:.3f}"
        axes.plot(variant.loss_change, row, "o", color=ORANGE, markersize=7)
        axes.text(end + 0.05 * span, row, label, va="center")


def _prepare(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=15, pad=12)
    axes.tick_params(length=0, colors=INK)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(RULE)
