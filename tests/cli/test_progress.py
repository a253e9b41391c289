"""Progress where standard error is no terminal."""

from __future__ import annotations

import time

import pytest

from penjing.cli._common import progress_bar


def test_a_log_gets_a_line_each_minute_with_the_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with progress_bar("compressing") as progress:
        # begun at 20 of 100, as a resumed run is: four in a minute, so that the other 76 take 19
        for seconds, done in ((0, 20), (30, 22), (60, 24), (90, 26), (119, 27), (121, 30)):
            now = 1000.0 + seconds
            progress(done, 100)
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines() == [
        "penjing: compressing: 24%, about 19 min left",
        "penjing: compressing: 30%, about 14 min left",
    ]


def test_a_short_run_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("evaluating") as progress:
        progress(0, 0)
        progress(1, 2)
        progress(2, 2)
    assert capsys.readouterr().err == ""
