"""Text that a model writes by itself, drawn from its own probabilities; in a process whose memory goes with it.

    python -m penjing.engine.samples FOLDER FILE SAMPLES LENGTH SEED THREADS BUDGET

writes ``tokens``, int32 (samples, length), into FILE, and a line with the number of tokens on standard output now and
then. `penjing.calibrate.own` starts it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..checkpoint import open_checkpoint
from ..checkpoint.safetensors import write_safetensors
from ..errors import PenjingError
from .messages import Load, Request, SamplingParams
from .process import load

STREAMS = 64  # texts at a time


def write_samples(
    settings: Load, samples: int, length: int, seed: int, tell: Callable[[int], None]
) -> NDArray[np.int32]:
    """Rows of tokens (samples, length), each begun by the model's first token, or by any where it has none.

    tell: how many tokens there are. Raises what `process.load` does, PenjingError when a step fails.
    """
    engine, _ = load(settings)
    first = open_checkpoint(settings.folder).config.get("bos_token_id")
    random = np.random.default_rng(seed)
    rows: dict[str, list[int]] = {}
    for number in range(samples):
        start = first if isinstance(first, int) else int(random.integers(engine.model.config.vocab_size))
        rows[str(number)] = [start]
        params = SamplingParams(max_tokens=length - 1, temperature=1.0, seed=seed, choice=number, ignore_eos=True)
        engine.add(Request(str(number), [start], params))
    while engine.has_work:
        for event in engine.step():
            if event.error is not None:
                raise PenjingError(f"{settings.folder}: {event.error}")
            rows[event.request_id] += event.tokens
        tell(sum(map(len, rows.values())))
    return np.asarray(list(rows.values()), np.int32)


def main() -> int:
    folder, file = sys.argv[1:3]
    samples, length, seed, threads, budget = map(int, sys.argv[3:])
    settings = Load(
        folder=folder, memory_budget=budget, max_model_len=length, max_num_seqs=min(samples, STREAMS), threads=threads
    )
    try:
        tokens = write_samples(settings, samples, length, seed, lambda count: print(count, flush=True))
    except PenjingError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    write_safetensors(Path(file), {"tokens": tokens})
    return 0


if __name__ == "__main__":
    sys.exit(main())
