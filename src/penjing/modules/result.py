"""What a verb did to a module, as a small table."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..stats import Change


@dataclass(frozen=True)
class Row:
    """One layer. sizes in bytes as stored; change: ΔL with only this layer compressed, if it was asked for."""

    layer: str
    was: str
    became: str
    bytes_before: int
    bytes_after: int
    change: Change | None = None


@dataclass(frozen=True)
class Result:
    """What became of a module.

    rows: the layers that changed.  kept: name → why a layer was left as it was.  bytes: all tensors as stored.
    change: ΔL = L(compressed) − L(original) on held-out samples with its 95 % interval, or None when not measured.
    base_loss: L(original) on the same samples.  notes: further lines, such as how the data were split.
    """

    verb: str
    rows: list[Row]
    bytes_before: int
    bytes_after: int
    kept: dict[str, str] = field(default_factory=dict)
    change: Change | None = None
    base_loss: float | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """Size after over size before."""
        return self.bytes_after / self.bytes_before

    def __str__(self) -> str:
        measured = any(row.change for row in self.rows)
        lines = [["layer", "was", "became", "bytes", "", "ΔL alone" if measured else ""]]
        for row in self.rows:
            sizes = f"{row.bytes_before:,} → {row.bytes_after:,}"
            share = f"{row.bytes_after / max(row.bytes_before, 1):.2f}×"
            lines.append([row.layer or "(itself)", row.was, row.became, sizes, share, str(row.change or "")])
        total = f"{self.bytes_before:,} → {self.bytes_after:,}"
        lines.append(["all tensors", "", "", total, f"{self.ratio:.2f}×", ""])
        widths = [max(len(line[column]) for line in lines) for column in range(6)]
        text = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        ]
        if self.change is not None:
            text.append(f"ΔL {self.change} (95 %, {self.change.n} held-out samples); L before {self.base_loss:.4f}")
        else:
            text.append("ΔL not measured: give data= and loss=")
        text += [f"kept: {name}: {why}" for name, why in self.kept.items()]
        return "\n".join([*text, *self.notes])

    __repr__ = __str__
