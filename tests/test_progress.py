from __future__ import annotations

import io

import pytest
from rich.console import Console

from mcpo import progress as progress_module
from mcpo.progress import clock, progress


def shown(*, terminal: bool, quiet: bool = False) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=120)
    with progress(console, "train", 4, quiet=quiet) as advance:
        for step in range(4):
            advance(1, f"loss {step}")
    return out.getvalue()


def test_a_log_gets_few_lines_with_an_estimate() -> None:
    lines = shown(terminal=False).splitlines()
    assert lines == ["train 4/4  ETA 0:00  loss 3"]


def test_lines_come_as_time_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(0, 1000, 20))
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: float(next(ticks)))
    lines = shown(terminal=False).splitlines()
    assert lines[0] == "train 1/4  ETA 1:00  loss 0"
    assert len(lines) == 4


def test_a_terminal_gets_a_bar() -> None:
    text = shown(terminal=True)
    assert "4/4" in text
    assert "ETA" in text
    assert "loss 3" in text


def test_other_ranks_are_silent() -> None:
    assert shown(terminal=False, quiet=True) == ""


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (61, "1:01"), (3600, "60:00")])
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text
