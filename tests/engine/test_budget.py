"""The memory ledger of serving: what fits, what is refused, and that the count is no fiction."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from penjing import models
from penjing.engine import budget
from penjing.engine.messages import Load
from penjing.engine.process import load
from penjing.errors import BadInput, OutOfBudget

NOVELIST = Path(__file__).parents[2] / "examples" / "novelist"
MIB = 1 << 20
WEIGHTS = 22 * MIB


@pytest.fixture(scope="module")
def config() -> models.ModelConfig:
    return models.read_config(models._open(NOVELIST))


def test_caches_get_what_is_left_and_no_more_than_they_can_use(config) -> None:
    limits, ledger = budget.limits(Load(folder="", max_num_seqs=4), config, WEIGHTS, 400 * MIB)
    assert limits.max_model_len == 1024
    assert limits.kv_bytes == 4 * 1024 * config.kv_bytes_per_token
    limits, ledger = budget.limits(Load(folder="", max_num_seqs=64), config, WEIGHTS, 280 * MIB)
    assert 0 < limits.kv_bytes <= ledger.left
    total = limits.kv_bytes + ledger.weights + ledger.activations + budget.PROCESSES_BYTES
    assert 280 * MIB - config.kv_bytes_per_token < total <= 280 * MIB


def test_a_shorter_window_if_the_whole_one_does_not_fit(config) -> None:
    step = budget.activation_bytes(config, 512, 64, 64)
    tight = WEIGHTS + step + budget.PROCESSES_BYTES + 100 * config.kv_bytes_per_token
    limits, _ = budget.limits(Load(folder=""), config, WEIGHTS, tight)
    assert limits.max_model_len == 100
    with pytest.raises(OutOfBudget, match="one sequence of 1024 tokens needs 6 MiB"):
        budget.limits(Load(folder="", max_model_len=1024), config, WEIGHTS, tight)
    with pytest.raises(OutOfBudget, match="0 MiB are left for caches"):
        budget.limits(Load(folder=""), config, WEIGHTS, 100 * MIB)


def test_refusals_before_anything_is_loaded(config) -> None:
    with pytest.raises(OutOfBudget, match="memory budget is 100 MiB"):
        load(Load(folder=str(NOVELIST), memory_budget=100 * MIB))
    with pytest.raises(BadInput, match="max_model_len=2000: the model has positions for 1024"):
        load(Load(folder=str(NOVELIST), max_model_len=2000))


def test_the_default_stays_below_what_there_is() -> None:
    from penjing import hardware

    assert 0 < budget.default_budget() < hardware.memory_limit_bytes()


def test_the_process_stays_within_the_count() -> None:
    """The peak of a process that fills all its caches and its largest steps, against the ledger's sum."""
    code = f"""
from penjing import hardware
from penjing.engine.messages import Load, Request, SamplingParams
from penjing.engine.process import load
from penjing.engine import budget
settings = Load(folder={str(NOVELIST)!r}, max_num_seqs=4)
engine, ready = load(settings)
for index in range(4):
    engine.add(Request(str(index), [5] * 1000, SamplingParams(max_tokens=8, ignore_eos=True, top_p=0.9)))
while engine.has_work:
    engine.step()
peak = hardware.peak_memory_bytes()
step = budget.activation_bytes(engine.model.config, 512, 4, 64)
print(peak, ready.weights_bytes + ready.kv_bytes + step + budget.PROCESSES_BYTES)
"""
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    peak, counted = map(int, answer.stdout.split())
    assert peak < counted, f"{peak / MIB:.0f} MiB where {counted / MIB:.0f} MiB were counted"
