"""Commands under a limit of time: what is kept of them, and that nothing of them stays behind."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from benchmarks import watched
from benchmarks.watched import Ended


@pytest.fixture
def watch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(watched, "GRACE", 1.0)

    def run(script: str, limit: float = 60.0) -> Ended:
        command = [sys.executable, "-c", script]
        return watched.watch(command, limit, tmp_path / "log", os.environ)

    return run


def test_what_is_printed_is_shown_and_kept(watch, tmp_path, capsys):
    script = "print('one'); print('FAILED tests/a.py::b - why'); print('2 passed'); print()"
    ended = watch(script)
    assert ended.passed
    assert not ended.stopped
    assert ended.last == "2 passed"
    assert ended.failures == ("FAILED tests/a.py::b - why",)
    assert "2 passed" in capsys.readouterr().out
    assert (tmp_path / "log").read_text().startswith("one\n")


def test_a_command_that_fails_is_told(watch):
    ended = watch("import sys; print('no device', file=sys.stderr); sys.exit(3)")
    assert not ended.passed
    assert ended.last == "no device"


@pytest.mark.parametrize("deaf", [False, True])
def test_a_command_that_hangs_in_silence_is_stopped(watch, deaf):
    ignore = "signal.signal(signal.SIGTERM, signal.SIG_IGN);" if deaf else ""
    ended = watch(f"import signal, time; {ignore} time.sleep(600)", 1.0)
    assert not ended.passed
    assert ended.stopped
    assert ended.last == "stopped after 1 s, at: nothing was printed"
    assert ended.seconds < 30


def test_what_a_command_started_ends_with_it(watch, tmp_path):
    """Though it holds the pipe open, and nobody waits for it."""
    child = "import time; time.sleep(600)"
    script = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    ended = watch(script, 4.0)
    pid = int(ended.last.rpartition(" ")[2])
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        # One that has ended and that nobody has asked for yet is no process any more.
        if ") Z " in Path(f"/proc/{pid}/stat").read_text():
            break
        time.sleep(0.05)
    else:
        assert not Path(f"/proc/{pid}").exists()
