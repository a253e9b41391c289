"""`penjing export`: the same model in a format that other programs read."""

from __future__ import annotations

from pathlib import Path

import typer


def export(
    model: str = typer.Argument(..., metavar="MODEL", help="The folder of a model, as penjing compress wrote it."),
    output: Path = typer.Option(..., "-o", "--output", metavar="OUT", help="Folder for the result: empty or new."),
    format: str = typer.Option("compressed-tensors", help="compressed-tensors: for vLLM and transformers."),
    json_output: bool = typer.Option(False, "--json", help="One JSON object."),
) -> None:
    """Write a model in another format; compressed-tensors turns bitmask storage into the form that everything reads.

    Example: penjing export out -o out-dense --format compressed-tensors
    """
    import dataclasses
    import json

    from ..checkpoint.export import export as run

    result = run(model, output, format)
    print(json.dumps(dataclasses.asdict(result)) if json_output else result)
