"""What a log (not a terminal) shows of a phase."""

from __future__ import annotations

import pytest

from isoray import progress
from isoray.progress import Phase, clock


def test_a_log_names_phase_job_and_time(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with Phase("leave-one-out", jobs=4) as phase:
        for seconds, job in ((1, "without a"), (29, "without b"), (30, "without c"), (30, "without d")):
            now[0] += seconds
            phase.done(job)
    assert capsys.readouterr().err.splitlines() == [
        "leave-one-out: 4 jobs",
        "leave-one-out: job 2/4 done (without b), about 30 s left",
        "leave-one-out: job 3/4 done (without c), about 20 s left",
        "leave-one-out: job 4/4 done (without d), about 0 s left",
        "leave-one-out: done in 1:30",
    ]


def test_parts_of_a_job_count(capsys: pytest.CaptureFixture[str]) -> None:
    with Phase("training", jobs=1) as phase:
        for _ in range(10):
            phase.advance(0.1)
        assert phase.finished == pytest.approx(1.0)
        assert phase.seconds_left() == pytest.approx(0.0, abs=1e-6)


def test_a_phase_that_broke_off_says_where(capsys: pytest.CaptureFixture[str]) -> None:
    phase = Phase("unlearning", jobs=3)
    with pytest.raises(ZeroDivisionError), phase:
        phase.advance(1 / 0)
    assert "unlearning: broke off at job 1/3 after 0 s" in capsys.readouterr().err


@pytest.mark.parametrize(("seconds", "text"), [(12.4, "12 s"), (75, "1:15"), (4000, "1:06:40")])
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text
