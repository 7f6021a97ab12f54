from __future__ import annotations

import re
import time

import pytest

from core import progress
from core.progress import Progress, format_seconds, say


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (75.2, "1:15"), (3599.6, "60:00"), (-1, "0:00")]
)
def test_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_say(capsys: pytest.CaptureFixture[str]) -> None:
    say("some_stage", "hello")
    assert capsys.readouterr().out == "[some_stage] hello\n"


def test_the_last_line_says_what_was_done(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("stage", total=3, unit="shards") as bar:
        for _ in range(3):
            bar.advance(tokens=10)
    (line,) = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"\[stage\] 100% 3/3 shards  [\d,]+ tokens/s  took 0:00", line)


def test_lines_come_on_the_way(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    with Progress("stage", total=4, unit="steps") as bar:
        bar.advance(note="loss 2.5")
        bar.advance(2)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert re.fullmatch(r"\[stage\]  25% 1/4 steps  left \d+:\d\d  loss 2.5", lines[0])
    assert lines[1].startswith("[stage]  75% 3/4 steps  left ")


def test_what_was_finished_before_is_said_and_does_not_count_as_speed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with Progress("stage", total=10, unit="shards", skipped=6) as bar:
        now[0] += 8
        bar.advance(2, tokens=80)
        lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "[stage] 6 of 10 shards were finished before",
        # Two in eight seconds: the other two take as long.
        "[stage]  80% 8/10 shards  10 tokens/s  left 0:08",
    ]


def test_an_error_is_not_reported_as_an_end(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError), Progress("stage", total=3, unit="shards"):
        raise RuntimeError("odd")
    assert capsys.readouterr().out == ""


def test_nothing_to_do_is_all_done(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("stage", total=0, unit="shards"):
        pass
    assert "100% 0/0 shards" in capsys.readouterr().out
