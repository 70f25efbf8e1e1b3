"""A command under a limit of time: shown as it goes, kept in a file, ended with all it started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Seconds that a process has to end by itself.
GRACE = 10.0
# How pytest begins the lines of its summary that name what failed.
FAILURES = ("FAILED ", "ERROR ")


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """What became of a command."""

    passed: bool
    stopped: bool
    """Time ran out."""
    last: str
    """The last line that said something."""
    failures: tuple[str, ...]
    """Lines of a summary of pytest."""
    seconds: float


def watch(command: Sequence[str], limit: float, log: Path, environment: Mapping[str, str]) -> Ended:
    """Run a command in the root of the repository.

    A process that hangs prints nothing, so a timer stops it, not the next line.
    """
    print(" ".join(command), flush=True)
    began, last = time.perf_counter(), "nothing was printed"
    failures: list[str] = []
    out_of_time = threading.Event()
    with (
        log.open("w") as file,
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            # A group of its own, so that what it starts ends with it.
            start_new_session=True,
        ) as process,
    ):
        timer = threading.Timer(limit, _stop, (process, out_of_time))
        timer.daemon = True
        timer.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                sys.stdout.write(line)
                sys.stdout.flush()
                file.write(line)
                last = line.strip() or last
                if line.startswith(FAILURES):
                    failures.append(line.strip())
            code = process.wait()
        finally:
            timer.cancel()
            _end(process)
    stopped = out_of_time.is_set()
    return Ended(
        passed=code == 0 and not stopped,
        stopped=stopped,
        last=f"stopped after {limit:.0f} s, at: {last}" if stopped else last,
        failures=tuple(failures),
        seconds=time.perf_counter() - began,
    )


def _stop(process: subprocess.Popen[str], out_of_time: threading.Event) -> None:
    out_of_time.set()
    _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    """End a process and its group: asked first, then not."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
