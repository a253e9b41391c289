"""`penjing doctor`: what this machine has, and what is missing."""

from __future__ import annotations

import typer


def doctor(json_output: bool = typer.Option(False, "--json", help="One JSON object.")) -> None:
    """What this machine has: cores, instruction set, memory, bandwidth; optional parts missing, and how to get them.

    Example: penjing doctor --json
    """
    from ..hardware import describe

    print(describe())
