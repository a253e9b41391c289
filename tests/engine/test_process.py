"""The engine in its own process: the same answers, its death, its end."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import psutil
import pytest

from penjing import models
from penjing.engine.client import EngineFailed, EngineProcess, Generation
from penjing.engine.messages import Event, Load, Request, SamplingParams
from stepping import greedy

NOVELIST = Path(__file__).parents[2] / "examples" / "novelist"
PROMPT = [901, 316, 260, 1471]


def with_engine(test, **settings):
    async def main():
        engine = EngineProcess(Load(folder=str(NOVELIST), **settings))
        await engine.start()
        try:
            return await asyncio.wait_for(test(engine), 60)
        finally:
            await engine.stop()
            assert engine.state == "dead"
            assert not psutil.pid_exists(engine._process.pid)

    return asyncio.run(main())


def request(name: str, count: int, **values) -> Request:
    return Request(name, PROMPT, SamplingParams(max_tokens=count, temperature=0, ignore_eos=True, **values))


async def collect(generation: Generation) -> list[Event]:
    return [await generation.next() for _ in iter(lambda: bool(generation.unfinished), False)]


def test_the_same_tokens_as_the_model() -> None:
    expected = greedy(models.load(NOVELIST), PROMPT, 20, "float16")

    async def test(engine: EngineProcess) -> list[Event]:
        with Generation(engine, [request("a", 20)]) as generation:
            return await collect(generation)

    events = with_engine(test)
    assert [token for event in events for token in event.tokens] == expected
    assert events[-1].finish_reason == "length"
    assert events[-1].timings.prefill > 0


def test_leaving_aborts_and_frees() -> None:
    async def test(engine: EngineProcess) -> None:
        with Generation(engine, [request("a", 900), request("b", 900)]) as generation:
            await generation.next()
            assert engine.stats.blocks_used > 0
        while engine.stats.blocks_used:
            await asyncio.sleep(0.01)
        assert (engine.stats.running, engine.stats.waiting) == (0, 0)

    with_engine(test, max_num_seqs=1)


def test_what_the_engine_refuses_comes_back_as_an_event() -> None:
    async def test(engine: EngineProcess) -> None:
        with Generation(engine, [Request("a", [5000], SamplingParams())]) as generation:
            event = await generation.next()
        assert event.finish_reason == "error"
        assert "outside the vocabulary" in event.error

    with_engine(test)


@pytest.mark.parametrize("deadly", [signal.SIGKILL, signal.SIGABRT])
def test_death_is_heard_of(deadly: signal.Signals) -> None:
    async def test(engine: EngineProcess) -> None:
        with Generation(engine, [request("a", 1000)]) as generation:
            await generation.next()
            os.kill(engine._process.pid, deadly)
            events = await collect(generation)
        assert events[-1].finish_reason == "error"
        assert events[-1].error == f"the engine's process was killed by signal {int(deadly)}"
        assert engine.state == "dead"
        with Generation(engine, [request("b", 5)]) as generation:
            assert "killed by signal" in (await generation.next()).error

    with_engine(test)


def test_the_terminals_signals_do_not_stop_it() -> None:
    async def test(engine: EngineProcess) -> None:
        for each in (signal.SIGINT, signal.SIGTERM):
            os.kill(engine._process.pid, each)
        with Generation(engine, [request("a", 5)]) as generation:
            assert (await collect(generation))[-1].finish_reason == "length"

    with_engine(test)


def test_a_stopped_process_is_seen_as_silent() -> None:
    async def test(engine: EngineProcess) -> None:
        assert engine.silent_seconds() == 0
        os.kill(engine._process.pid, signal.SIGSTOP)
        with Generation(engine, [request("a", 5)]) as generation:
            await asyncio.sleep(0.3)
            assert engine.silent_seconds() >= 0.3
            os.kill(engine._process.pid, signal.SIGCONT)
            await collect(generation)
        assert engine.silent_seconds() == 0

    with_engine(test)


def test_a_model_that_cannot_be_loaded(tmp_path: Path) -> None:
    async def main() -> None:
        engine = EngineProcess(Load(folder=str(tmp_path)))
        with pytest.raises(EngineFailed, match=r"config\.json is missing") as error:
            await engine.start()
        assert error.value.exit_code == 2
        await engine.stop()

    asyncio.run(main())
