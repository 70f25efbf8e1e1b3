"""Progress with an estimate of the time left: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

Advance = Callable[[int, str], None]
"""Called with how many units were done since the last call, and a note to show."""

# Logs of batch systems are read afterwards: a line now and then is enough.
SECONDS_BETWEEN_LINES = 15.0


@contextmanager
def progress(console: Console, what: str, total: int, *, quiet: bool = False) -> Generator[Advance]:
    """Show the progress of ``total`` units; yields the function to call as they are done."""
    if quiet:
        yield lambda units, note="": None
    elif console.is_terminal:
        with _bar(console) as bar:
            task = bar.add_task(what, total=total, note="")

            def advance(units: int, note: str = "") -> None:
                bar.update(task, advance=units, note=note)

            yield advance
    else:
        yield _Lines(console, what, total)


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<12}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    )


class _Lines:
    """Prints a line when enough time has passed, and one at the end."""

    def __init__(self, console: Console, what: str, total: int) -> None:
        self._console = console
        self._what = what
        self._total = total
        self._done = 0
        self._began = self._printed = time.monotonic()

    def __call__(self, units: int, note: str = "") -> None:
        self._done += units
        now = time.monotonic()
        if self._done < self._total and now - self._printed < SECONDS_BETWEEN_LINES:
            return
        self._printed = now
        left_s = (now - self._began) / self._done * (self._total - self._done)
        self._console.print(
            f"{self._what} {self._done}/{self._total}  ETA {clock(left_s)}  {note}",
            highlight=False,
        )


def clock(seconds: float) -> str:
    """Minutes and seconds, as a stopwatch shows them."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
