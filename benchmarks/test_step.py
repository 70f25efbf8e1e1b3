"""A whole training step, ours and others', at every point.

    python -m pytest benchmarks/test_step.py --benchmark-only --quick

A point is one test, because its arms take turns: each round times every arm once, so that what else
the machine does falls on all of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import pytest

from benchmarks.peers import Missing
from benchmarks.step import session
from benchmarks.step.arms import Arm
from benchmarks.step.bars import bars
from benchmarks.step.points import Point
from benchmarks.step.rows import Row

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

    from benchmarks.rows import Provenance


def test_step(
    point: Point,
    arms: Sequence[Arm],
    num_rounds: int,
    benchmark: BenchmarkFixture,
    origin: Provenance,
    record_steps: Callable[[Sequence[Row]], None],
) -> None:
    """Gate the arms of a point, measure them, write their rows."""
    try:
        ready = session.prepare(point, arms, None, print)
    except Missing as missing:
        pytest.skip(str(missing))
    peaks = ready.peaks() if benchmark.enabled else {}
    numbers = itertools.count()
    benchmark.pedantic(lambda: ready.round(next(numbers)), rounds=num_rounds)
    found = ready.rows(peaks, origin)
    benchmark.extra_info.update(
        {
            "seconds": {row.arm: row.median for row in found},
            "peak_bytes": {row.arm: row.peak_bytes for row in found},
            "bars": {bar.name: bar.measured for bar in bars({row.arm: row for row in found})},
        }
    )
    if benchmark.enabled:
        record_steps(found)
