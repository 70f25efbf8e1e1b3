"""Time, and the load of the machine meanwhile.

Time is CPU time of this process divided by its threads, since the machine may be shared: other
jobs then disturb through caches and memory alone. Wall time and the load by others are kept too.
On a GPU it is the time between two events, with the device idle before.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from benchmarks.workload import Results

T = TypeVar("T")
Job = Callable[[], Results]


@dataclass(frozen=True, kw_only=True, slots=True)
class Taken:
    """What one call took."""

    seconds: float
    wall_seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Rounds:
    """Every timed round of a cell, and the bare products right before each."""

    taken: list[Taken] = field(default_factory=list[Taken])
    products: list[dict[str, float]] = field(default_factory=list[dict[str, float]])
    others: list[float] = field(default_factory=list[float])
    """Cores that other processes kept busy during a round and its products."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """How long a cell may take."""

    rounds: int
    budget: float

    def rounds_of(self, wall_seconds: float) -> int:
        """How many rounds of this length fit into the budget; one at least."""
        return max(1, min(self.rounds, int(self.budget / wall_seconds)))


def cpu_seconds() -> float:
    """CPU seconds of this process so far, per thread of torch."""
    return time.process_time() / torch.get_num_threads()


def seconds_of(run: Callable[[], None], device: str) -> float:
    """How long a call takes on a device."""
    if device == "cuda":
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        before.record()
        run()
        after.record()
        after.synchronize()
        return before.elapsed_time(after) / 1000
    began = cpu_seconds()
    run()
    return cpu_seconds() - began


def timed(job: Callable[[], T], device: str = "cpu") -> tuple[T, Taken]:
    """Call a job once."""
    found: list[T] = []
    wall = time.perf_counter()
    seconds = seconds_of(lambda: found.append(job()), device)
    return found[0], Taken(seconds=seconds, wall_seconds=time.perf_counter() - wall)


def run_rounds(
    pedantic: Callable[..., object],
    job: Job,
    time_products: Callable[[], dict[str, float]],
    rounds: int,
    device: str = "cpu",
) -> Rounds:
    """Time a job, each time right after the bare products it is compared with.

    Args:
        pedantic: of the ``benchmark`` fixture.
        job: what is timed.
        time_products: times the products.
        rounds: how often.
        device: where it runs.
    """
    found = Rounds()
    # Taken before the products, so that ticks of a hundredth of a second suffice for short jobs.
    began = Clocks.read()

    def before() -> None:
        nonlocal began
        began = Clocks.read()
        found.products.append(time_products())

    def run() -> None:
        _, taken = timed(job, device)
        found.taken.append(taken)
        found.others.append(Clocks.read().others_since(began))

    pedantic(run, setup=before, rounds=rounds)
    return found


class Clocks(NamedTuple):
    """Seconds: CPU time of the machine, CPU time of this process, wall time."""

    machine: float
    own: float
    wall: float

    @classmethod
    def read(cls) -> Clocks:
        """Now."""
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        user, nice, system, _, _, irq, softirq, steal = (int(ticks) for ticks in fields)
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        return cls(busy, time.process_time(), time.perf_counter())

    def others_since(self, before: Clocks) -> float:
        """Cores that other processes kept busy."""
        others = (self.machine - before.machine) - (self.own - before.own)
        cores = others / (self.wall - before.wall)
        # The machine counts ticks of a hundredth of a second, which matters in short rounds.
        return min(max(0.0, cores), float(os.cpu_count() or 1))
