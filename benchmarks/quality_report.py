"""quality.json as a page and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

INK = "#808080"  # the same distance from white and from black
OURS, THEIRS = "#2f81c7", ("#d0833b", "#8a6bbf", "#4b9c6a", "#c05a6a", "#a8a29e", "#6f8aa0")
TARGETS = {"2": 0.9, "3": 0.9, "4": 0.9, "8": 0.9, "50 %": 0.9, "50 % + 4": 0.8}
Row = Mapping[str, Any]


def write(report: Mapping[str, Any], output: Path) -> None:
    rows, used = report["rows"], report["settings"]
    lines = [
        "# Quality beside other tools",
        "",
        "Made by `python benchmarks/quality.py --calibration FILE`, in which every choice can be read.",
        f"Model {used['model']} (perplexity {report['base_perplexity']:.3f} as it is); calibrated on the first",
        f"{used['rows']} × 512 tokens of {used['calibration']}, measured on the first {used['windows']} × 512 of",
        f"{used['test']}, which share nothing. Groups of {used['group']} columns; 2 and 3 bits have zero points.",
        "All weights are decoded and measured by one evaluator in float32. ΔL in nats per token, its interval",
        "paired over windows. Bits per weight are those of the layers compressed, with steps and zero points,",
        "and a bit a weight for the mask where half is pruned. Tools have their default settings, llm-",
        "compressor's GPTQ also its observer of least squared error. Seconds and memory are of the whole",
        "process, imports included: cuda on a GPU and two cores of its host, else on two cores that others",
        "used too, so that they do not compare speeds. What Penjing does at each task was chosen on other",
        "rows of the calibration text, not on the test text. One run.",
        "",
        "## Targets",
        "",
        "ΔL of what the preset `balanced` does beside that of the best peer with at most 1.05 × the bits",
        "per weight (for 50 % + 4, llm-compressor's SparseGPT then GPTQ). `trained`: blocks recover by",
        "moving codes, then steps, norms and biases of the whole model are distilled, as `balanced` has it",
        "up to 3 bits and where weights are pruned. A peer that lost",
        "nothing leaves no ratio. Intervals are over windows of text alone: they do not say how far rounding",
        "another way would move a ΔL, so at 8 bits, where models come out better than the original too, read",
        "KL. What was not to be had is named at the end, and not among the peers.",
        "",
        "| task | Penjing | best peer | ratio | target | | ratio of KL |",
        "|---|---|---|---|---|---|---|",
        *(line for task in TARGETS for line in _target(rows, task)),
        "",
        "## All",
        "",
        "![ΔL against bits per weight](quality.svg)",
        "",
        "| task | tool | method | bits/weight | perplexity | ΔL, 95 % | KL | same top-1 | s | peak MB |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *map(_line, (row for row in rows if "loss_change" in row)),
    ]
    lines += ["", *(f"{row['tool']} {row['note']} at {row['task']} bits." for row in rows if "note" in row)]
    if missing := [row for row in rows if "reason" in row]:
        lines += ["", "## Not to be had", "", *(_missing(row) for row in missing)]
    output.with_suffix(".md").write_text("\n".join(lines) + "\n")
    _draw(rows, output.with_suffix(".svg"))


def _name(row: Row) -> str:
    return f"{row['tool']} {row['method']}"


def _line(row: Row) -> str:
    low, high = row["loss_change_ci95"]
    cells = [row["task"], row["tool"], row["method"], f"{row['bits_per_weight']:.3f}", f"{row['perplexity']:.3f}"]
    cells += [f"{row['loss_change']:+.4f} [{low:+.4f}, {high:+.4f}]", f"{row['kl']:.5f}"]
    memory = f"{row['peak_rss_bytes'] / 1e6:.0f}" if "peak_rss_bytes" in row else "–"
    cuda = " cuda" if row.get("device") == "cuda" else ""
    cells += [f"{row['top1_agreement']:.2%}", f"{row['seconds']:.0f}{cuda}", memory]
    return f"| {' | '.join(cells)} |"


def _missing(row: Row) -> str:
    return f"- {_name(row)}, {row['task']}: `{row['reason']}`"


def _target(rows: Sequence[Row], task: str) -> list[str]:
    there = [row for row in rows if row["task"] == task and "loss_change" in row]
    ours = next((row for row in there if row["tool"] == "penjing"), None)
    if ours is None:
        return []
    most = 1.05 * ours["bits_per_weight"]
    theirs = [row for row in there if row["tool"] != "penjing" and row["bits_per_weight"] <= most]
    if not theirs:
        return []
    best, target = min(theirs, key=lambda row: row["loss_change"]), TARGETS[task]
    ratio = f"{ours['loss_change'] / best['loss_change']:.2f}" if best["loss_change"] > 0 else "–"
    said = "met" if ours["loss_change"] <= target * best["loss_change"] else "missed"
    nearest = min(row["kl"] for row in theirs)
    mine, other = (f"{_name(row)} {row['loss_change']:+.5f} at {row['bits_per_weight']:.3f}" for row in (ours, best))
    return [f"| {task} | {mine} | {other} | {ratio} | ≤ {target} | {said} | {ours['kl'] / nearest:.2f} |"]


def _draw(rows: Sequence[Row], file: Path) -> None:
    """ΔL against bits per weight, one curve a tool: a peer's best method, Penjing's default."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    colours = {"text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK}
    theirs = iter(THEIRS)
    with rc_context({"font.size": 11, "svg.fonttype": "path", "svg.hashsalt": "penjing", **colours}):
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.subplots()
        axes.patch.set_alpha(0)
        for tool in dict.fromkeys(row["tool"] for row in rows):
            points = _curve([row for row in rows if row["tool"] == tool])
            if points:
                colour = OURS if tool == "penjing" else next(theirs)
                x, y, low, high = zip(*points, strict=True)
                axes.errorbar(x, y, (low, high), color=colour, label=tool, marker="o", markersize=4, capsize=2)
        axes.set(xlabel="bits per weight", ylabel="ΔL, nats per token")
        axes.set_yscale("symlog", linthresh=1e-3)
        axes.axhline(0, color=INK, linewidth=0.8)
        axes.legend(frameon=False, ncols=2)
        figure.savefig(file, metadata={"Date": None}, transparent=True)


def _curve(rows: Sequence[Row]) -> list[tuple[float, float, float, float]]:
    points = []
    for task in ("2", "3", "4", "8"):
        there = [row for row in rows if row["task"] == task and "loss_change" in row]
        default = there[:1] if there and there[0]["tool"] == "penjing" else there
        if default:
            row = min(default, key=lambda row: row["loss_change"])
            change, (low, high) = row["loss_change"], row["loss_change_ci95"]
            points.append((row["bits_per_weight"], change, change - low, high - change))
    return points
