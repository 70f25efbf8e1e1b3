"""Time, memory and the load of the machine.

Time is CPU time of this process divided by its threads, since the machine may be shared: other
jobs then disturb through caches and memory alone. Wall time and the load by others are kept too.

Memory is the peak of the process beyond what it held before, less the results: VmHWM, reset
through clear_refs, minus VmRSS. malloc_trim goes first, so that memory which an earlier cell left
with the allocator counts again when it is used. It is taken in a call of its own, as trimming
makes the next call slower, and after a first call, so that compiling and loading do not count.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.workload import Results

Job = Callable[[], Results]


@dataclass(frozen=True, kw_only=True, slots=True)
class Taken:
    """What one call took."""

    seconds: float
    wall_seconds: float


@dataclass(kw_only=True, slots=True)
class Rounds:
    """Every timed round of a cell, and the bare products right before each."""

    taken: list[Taken] = field(default_factory=list[Taken])
    products: list[dict[str, float]] = field(default_factory=list[dict[str, float]])
    others: list[float] = field(default_factory=list[float])
    """Cores that other processes kept busy during a round and its products."""
    memory_mib: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """How long a cell may take."""

    rounds: int
    budget: float


def cpu_seconds() -> float:
    """CPU seconds of this process so far, per thread of torch."""
    return time.process_time() / torch.get_num_threads()


def timed(job: Job) -> tuple[Results, Taken]:
    """Call a job once."""
    wall, cpu = time.perf_counter(), cpu_seconds()
    results = job()
    seconds = cpu_seconds() - cpu
    return results, Taken(seconds=seconds, wall_seconds=time.perf_counter() - wall)


def timed_with_memory(job: Job) -> tuple[float, Taken]:
    """Call a job once; MiB at its peak beyond what was there before and what it returns."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_mib("VmRSS")
    results, taken = timed(job)
    return _status_mib("VmHWM") - before - results.nbytes / 2**20, taken


def run_rounds(
    pedantic: Callable[..., object],
    job: Job,
    first: Taken,
    time_products: Callable[[], dict[str, float]],
    limits: Limits,
) -> Rounds:
    """Measure memory, then as many rounds as fit into the budget, one at least.

    Args:
        pedantic: of the ``benchmark`` fixture.
        job: what is timed.
        first: what its first call took, compiling included. A job that took more than twice the
            budget is called only once more, and its memory measured in that round.
        time_products: times the bare products; called right before each round.
        limits: on rounds and seconds.
    """
    found = Rounds()
    hopeless = first.wall_seconds > 2 * limits.budget
    rounds = 1
    if not hopeless:
        found.memory_mib, again = timed_with_memory(job)
        start = time.perf_counter()
        time_products()
        each = again.wall_seconds + time.perf_counter() - start
        rounds = max(1, min(limits.rounds, int(limits.budget / each)))

    # Taken before the products, so that ticks of a hundredth of a second suffice for short jobs.
    began = _Clocks.read()

    def before() -> None:
        nonlocal began
        began = _Clocks.read()
        found.products.append(time_products())

    def run() -> None:
        if hopeless:
            found.memory_mib, taken = timed_with_memory(job)
        else:
            _, taken = timed(job)
        found.taken.append(taken)
        found.others.append(_Clocks.read().others_since(began))

    pedantic(run, setup=before, rounds=rounds)
    return found


class _Clocks(NamedTuple):
    """Seconds: CPU time of the machine, CPU time of this process, wall time."""

    machine: float
    own: float
    wall: float

    @classmethod
    def read(cls) -> _Clocks:
        """Now."""
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        user, nice, system, _, _, irq, softirq, steal = (int(ticks) for ticks in fields)
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        return cls(busy, time.process_time(), time.perf_counter())

    def others_since(self, before: _Clocks) -> float:
        """Cores that other processes kept busy."""
        others = (self.machine - before.machine) - (self.own - before.own)
        cores = others / (self.wall - before.wall)
        # The machine counts ticks of a hundredth of a second, which matters in short rounds.
        return min(max(0.0, cores), float(os.cpu_count() or 1))


def _status_mib(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))
