"""Waiting for the engine's events: a cancellation is never lost, not even one that meets an event."""

from __future__ import annotations

import asyncio
from unittest.mock import Mock

import pytest

from penjing.engine.client import Generation
from penjing.engine.messages import Event


@pytest.mark.parametrize("turns", range(5))
def test_a_cancellation_that_meets_an_event_is_kept(turns: int) -> None:
    """Whatever turn of the loop it falls in: who asks to cancel, and is told yes, gets it."""

    async def scene() -> None:
        waiting = asyncio.create_task(generation.next(15.0))
        for _ in range(3):  # until it waits for the queue
            await asyncio.sleep(0)
        generation._queue.put_nowait(Event(request_id="a"))
        for _ in range(turns):
            await asyncio.sleep(0)
        if waiting.cancel():
            with pytest.raises(asyncio.CancelledError):
                await waiting
        else:
            assert waiting.result() is not None

    generation = Generation(Mock(), [])
    asyncio.run(scene())


def test_nothing_for_a_while_is_none() -> None:
    async def scene() -> Event | None:
        return await Generation(Mock(), []).next(0.01)

    assert asyncio.run(scene()) is None
