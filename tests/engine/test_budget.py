"""The memory ledger of serving: what fits, what is refused, and that the count is no fiction."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from penjing import kernels, models
from penjing.engine import budget
from penjing.engine.messages import Load
from penjing.engine.process import load
from penjing.errors import BadInput, OutOfBudget, Unsupported

NOVELIST = Path(__file__).parents[2] / "examples" / "novelist"
MIB = 1 << 20
WEIGHTS = 22 * MIB


@pytest.fixture(scope="module")
def config() -> models.ModelConfig:
    return models.read_config(models._open(NOVELIST))


SIZES = budget.Sizes(weights=WEIGHTS, block=MIB, state=0, step=10 * MIB)
REST = budget.PROCESSES_BYTES + WEIGHTS + 10 * MIB


def test_caches_get_what_is_left_and_no_more_than_they_can_use(config) -> None:
    limits, ledger = budget.limits(Load(folder="", max_num_seqs=4), config, SIZES, 400 * MIB)
    assert (limits.max_model_len, limits.blocks) == (1024, 4 * 32)
    limits, ledger = budget.limits(Load(folder="", max_num_seqs=64), config, SIZES, REST + 90 * MIB)
    assert limits.blocks == 90
    assert ledger.left == 90 * MIB


def test_a_shorter_window_if_the_whole_one_does_not_fit(config) -> None:
    tight = REST + 3 * MIB + 5
    limits, _ = budget.limits(Load(folder=""), config, SIZES, tight)
    assert (limits.max_model_len, limits.blocks) == (96, 3)
    with pytest.raises(OutOfBudget, match="one sequence of 1024 tokens needs 32 MiB"):
        budget.limits(Load(folder="", max_model_len=1024), config, SIZES, tight)
    with pytest.raises(OutOfBudget, match="0 MiB are left for caches"):
        budget.limits(Load(folder=""), config, SIZES, 100 * MIB)


def test_recurrent_state_is_counted_and_keeps_prefixes_apart(config) -> None:
    sizes = budget.Sizes(weights=WEIGHTS, block=MIB, state=2 * MIB, step=10 * MIB)
    limits, _ = budget.limits(Load(folder="", max_num_seqs=4), config, sizes, REST + 50 * MIB)
    assert (limits.blocks, limits.prefix_caching) == (42, False)
    with pytest.raises(Unsupported, match="recurrent state"):
        budget.limits(Load(folder="", max_num_seqs=4, enable_prefix_caching=True), config, sizes, REST + 50 * MIB)


def test_a_screen_takes_no_sequence_its_length(config) -> None:
    screen = kernels.screen_bytes(config.vocab_size, config.hidden)
    for settings, enough in ((Load(folder="", max_num_seqs=1), 32), (Load(folder="", max_model_len=512), 16)):
        room = REST + enough * MIB + screen
        assert budget.has_room_for_screen(settings, config, SIZES, room)
        assert not budget.has_room_for_screen(settings, config, SIZES, room - 1)


def test_the_screen_counts_as_weights(monkeypatch) -> None:
    settings = Load(folder=str(NOVELIST), max_num_seqs=1)
    engine, screened = load(settings)
    assert engine.model.screen is not None
    monkeypatch.setattr(budget, "has_room_for_screen", lambda *_: False)
    plain_engine, plain = load(settings)
    assert plain_engine.model.screen is None
    assert plain.weights_bytes == screened.weights_bytes - engine.model.screen.nbytes


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
step = engine.model.activation_bytes(512)
print(peak, ready.weights_bytes + ready.blocks * ready.block_bytes + step + budget.PROCESSES_BYTES)
"""
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    peak, counted = map(int, answer.stdout.split())
    assert peak < counted, f"{peak / MIB:.0f} MiB where {counted / MIB:.0f} MiB were counted"
