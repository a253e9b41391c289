"""`penjing compress`: a checkpoint folder, quantized and pruned block by block."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from ..methods import JOINT, PRUNERS, QUANTIZERS, TRANSFORMS
from ..presets import PRESETS
from ..recipe import ACTIVATIONS, BUDGETS, FORMATS


def compress(
    model: str = typer.Argument(..., metavar="MODEL", help="The folder of a Hugging Face model."),
    output: Path = typer.Option(..., "-o", "--output", metavar="OUT", help="Folder for the result: empty or new."),
    recipe: str | None = typer.Option(
        None,
        help=f"A file (YAML, JSON) or a preset: {', '.join(PRESETS[:8])}, int4-sparse50, draft … With text: balanced.",
    ),
    method: str | None = typer.Option(None, help=f"Quantization method: {', '.join(QUANTIZERS)}."),
    format: str | None = typer.Option(None, help=f"Numbers that weights become: {', '.join(FORMATS)}; int."),
    bits: int | None = typer.Option(None, help="Bits of a weight, 2 to 8."),
    group_size: int | None = typer.Option(None, help="Columns that share a step; -1: one step a row."),
    symmetric: bool | None = typer.Option(None, "--symmetric/--asymmetric", help="Without or with zero points."),
    activations: str | None = typer.Option(None, help=f"What the server makes of inputs: {', '.join(ACTIVATIONS)}."),
    observer: str | None = typer.Option(
        None, help="Range of a group: minmax, percentile, mse, histogram; with a hessian importance."
    ),
    transform: str | None = typer.Option(None, help=f"Scales folded in before quantizing: {', '.join(TRANSFORMS)}."),
    prune_method: str | None = typer.Option(None, help=f"Pruning method: {', '.join(PRUNERS)}."),
    sparsity: float | None = typer.Option(None, help="Share of the weights that is removed, in (0, 1)."),
    pattern: str | None = typer.Option(
        None, help="unstructured, N:M (keep N of each M in a row), or channel (neurons)."
    ),
    scope: str | None = typer.Option(None, help="Weights are ranked within a row or a tensor."),
    budget: str | None = typer.Option(
        None, help=f"How a sparsity is shared out among layers: {', '.join(BUDGETS)}; uniform."
    ),
    joint: bool = typer.Option(False, "--joint", help=f"Prune and quantize in one: both methods {', '.join(JOINT)}."),
    option: list[str] | None = typer.Option(
        None, metavar="NAME=VALUE", help="The quantization method's own, e.g. damping=0.02; docs/methods.md has all."
    ),
    prune_option: list[str] | None = typer.Option(None, metavar="NAME=VALUE", help="The pruning method's own."),
    transform_option: list[str] | None = typer.Option(None, metavar="NAME=VALUE", help="The transform's own."),
    remove_layers: int | None = typer.Option(None, help="Decoder layers that go, those of the least influence."),
    prune_neurons: float | None = typer.Option(
        None, help="Share of each MLP's neurons that goes; tensors get smaller."
    ),
    prune_heads: float | None = typer.Option(None, help="Share of attention's heads that goes, with keys and values."),
    prune_experts: float | None = typer.Option(None, help="Share of a mixture's experts that goes."),
    shrink_method: str | None = typer.Option(
        None, help="How these are chosen: obs or wanda; l1, l2, random need no data."
    ),
    multiple: int | None = typer.Option(None, min=1, help="Neurons that stay come in multiples of it; 64."),
    recover: bool = typer.Option(False, "--recover", help="Train each compressed block towards the original's output."),
    rotate: bool = typer.Option(
        False, "--rotate", help="Turn the model by Hadamard rotations first, so that no channel stands out."
    ),
    kv_cache: str | None = typer.Option(
        None, metavar="fp8", help="Steps for vLLM's cache of keys and values, found on the text. Alone, weights stay."
    ),
    ignore: list[str] | None = typer.Option(None, help="Modules to leave alone (instead of head, embeddings, norms)."),
    sparse_storage: str = typer.Option("dense", help="dense, or bitmask: smaller, for Penjing only."),
    calibration: list[Path] | None = typer.Option(
        None,
        metavar="FILE",
        help="Texts or chats (.txt, .jsonl, .parquet) for methods that need data; several allowed.",
    ),
    samples: int | None = typer.Option(None, help="Rows of text to calibrate on; 128."),
    sequence_length: int | None = typer.Option(None, help="Tokens of each of them; 512, or what the model can take."),
    device: str = typer.Option("auto", help="Where calibration computes: auto, cpu or cuda."),
    memory_limit: str | None = typer.Option(
        None, metavar="SIZE", help="Peak memory, e.g. 4GiB; refused if too little."
    ),
    shard_size: str = typer.Option("64MiB", metavar="SIZE", help="Original bytes that share a file of the result."),
    check: str = typer.Option("sample", help="Blocks whose logits the self-check compares: sample, full or none."),
    evaluate: Path | None = typer.Option(None, metavar="FILE", help="Held-out text: measure ΔL and note it."),
    seed: int | None = typer.Option(None, help="For methods that draw."),
    restart: bool = typer.Option(False, "--restart", help="Throw away what an earlier run wrote, and begin again."),
    json_output: bool = typer.Option(False, "--json", help="One JSON object."),
) -> None:
    """Compress a checkpoint, one block in memory at a time; after a crash the same command goes on where it was.

    Example: penjing compress examples/novelist -o out --bits 4 --group-size 64
    """
    import dataclasses
    import json
    import sys

    from ..compress import compress as run
    from ..errors import BadInput
    from ._common import parse_size, progress_bar

    if joint and {method, prune_method} - {None, "joint"}:
        raise BadInput("--joint is one method for both; leave --method and --prune-method out")

    with progress_bar("compressing") as progress:
        result = run(
            model,
            output,
            recipe,
            sparse_storage=sparse_storage,  # type: ignore[arg-type]
            memory_limit=parse_size(memory_limit, "--memory-limit") if memory_limit else None,
            shard_bytes=parse_size(shard_size, "--shard-size"),
            restart=restart,
            check=check,  # type: ignore[arg-type]
            evaluate=evaluate,
            calibration=calibration or (),
            samples=samples,
            sequence_length=sequence_length,
            device=device,  # type: ignore[arg-type]
            progress=progress,
            announce=lambda text: print(text, file=sys.stderr),
            method=method or ("joint" if joint else None),
            format=format,
            bits=bits,
            group_size=group_size,
            symmetric=symmetric,
            activations=activations,
            observer=observer,
            options=_options(option, "--option"),
            transform=transform,
            transform_options=_options(transform_option, "--transform-option"),
            prune_method=prune_method or ("joint" if joint else None),
            prune_options=_options(prune_option, "--prune-option"),
            sparsity=sparsity,
            pattern=pattern,
            scope=scope,
            budget=budget,
            remove_layers=remove_layers,
            prune_neurons=prune_neurons,
            prune_heads=prune_heads,
            prune_experts=prune_experts,
            shrink_method=shrink_method,
            multiple=multiple,
            recover=recover or None,
            rotate=rotate or None,
            kv_cache=kv_cache,
            ignore=ignore or None,
            seed=seed,
        )
    print(json.dumps(dataclasses.asdict(result)) if json_output else result)


def _options(words: Sequence[str] | None, flag: str) -> dict[str, Any] | None:
    """``damping=0.02`` and the like → names and values; a value that is no number, true or false is a word."""
    import json

    from ..errors import BadInput

    found: dict[str, Any] = {}
    for word in words or ():
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise BadInput(f"{flag} {word}: give NAME=VALUE, such as damping=0.02")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found or None
