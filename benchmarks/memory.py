"""Peak memory of a job, measured in a process of its own that takes requests.

It is the peak beyond what the process held before, less the results: VmHWM, reset through
clear_refs, minus VmRSS, in a warm call, so that compiling and loading do not count.

A process of its own, one for all cells of a shape and dtype, because of the allocator: glibc keeps
freed blocks and hands them out again, so that in the process that is timed the peak of a job
depended on the jobs before it, by up to a half. Here every block from 64 KiB is mapped on its own
from the start, and given back when it is freed. The peak is then what the job holds, whatever ran
before. Timing under such a rule would charge jobs for fresh pages that an ordinary process reuses.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, NamedTuple, TypeVar

import torch

from benchmarks import peers
from benchmarks.cells import Shape, parse_shape
from benchmarks.measure import Taken, timed
from benchmarks.workload import Results, first_rows, make_inputs, make_job
from mcpo_kernels.linear_logprob import cpu

T = TypeVar("T")
ROOT = Path(__file__).parents[1]
# Of mallopt(3).
M_MMAP_THRESHOLD, MAPPED = -3, 2**16
READY = "ready\n"
NUM_WARM_ROWS = 8


class Request(NamedTuple):
    """A job; of a slow one the call that warms up has few rows."""

    impl: str
    pattern: str
    way: str
    slow: bool


class Peak(NamedTuple):
    """What a warm call needed, and how long it took."""

    mib: float
    wall_seconds: float


@contextmanager
def open_meter(shape: Shape, dtype: str) -> Generator[Callable[[Request], Peak], None, None]:
    """Start the process; the function sends it a request and waits for the answer."""
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.memory", str(shape), dtype],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    requests, replies = process.stdin, process.stdout

    def ask(request: Request) -> Peak:
        # To a process that has ended nothing can be written; reading says that it has.
        with suppress(BrokenPipeError):
            requests.write(json.dumps(request) + "\n")
            requests.flush()
        return Peak(*json.loads(_line(process, replies)))

    try:
        # So that its start does not disturb what is timed.
        _line(process, replies)
        yield ask
    finally:
        with suppress(BrokenPipeError):
            requests.close()
        process.wait()
        replies.close()


def peak_of(job: Callable[[], Results]) -> Peak:
    """Call a job once; its results do not count."""
    results, taken, mib = highest(job)
    return Peak(mib - results.nbytes / 2**20, taken.wall_seconds)


def keep_nothing() -> None:
    """Have the allocator of this process give back whatever is freed, from now on."""
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MAPPED)


def highest(job: Callable[[], T]) -> tuple[T, Taken, float]:
    """Call a job once: what it gives, what it took, and its MiB beyond what was held before."""
    ctypes.CDLL(None).malloc_trim(0)
    if cpu.AVAILABLE:
        # What is held from call to call is needed all the same.
        torch.ops.mcpo_cpu.release_cache()
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_mib("VmRSS")
    results, taken = timed(job)
    return results, taken, _status_mib("VmHWM") - before


def peak_on_gpu(job: Callable[[], Results]) -> Peak:
    """Of a job on a GPU, in this process: torch's allocator counts what is allocated."""
    job()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results, taken = timed(job, "cuda")
    held = torch.cuda.max_memory_allocated() - before - results.nbytes
    return Peak(held / 2**20, taken.wall_seconds)


def serve(shape: Shape, dtype: str, requests: Iterable[str], replies: IO[str]) -> None:
    """Answer requests, one a line, until there are no more."""
    inputs = make_inputs(shape, dtype)
    replies.write(READY)
    replies.flush()
    for line in requests:
        request = Request(*json.loads(line))
        head = peers.build(peers.named(request.impl))
        warm = first_rows(inputs, NUM_WARM_ROWS) if request.slow else inputs
        make_job(head, warm, request.pattern, request.way)()
        peak = peak_of(make_job(head, inputs, request.pattern, request.way))
        replies.write(json.dumps(peak) + "\n")
        replies.flush()


def main() -> None:
    """Serve on standard input and output."""
    keep_nothing()
    replies = os.fdopen(os.dup(1), "w")
    # Whatever a library prints must not look like an answer.
    os.dup2(2, 1)
    serve(parse_shape(sys.argv[1]), sys.argv[2], sys.stdin, replies)


def _line(process: subprocess.Popen[str], replies: IO[str]) -> str:
    line = replies.readline()
    if not line:
        raise RuntimeError(
            f"the process that measures memory ended with {process.wait()}; its output says why "
            "(-9: killed, as when memory is short)"
        )
    return line


def _status_mib(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))


if __name__ == "__main__":
    main()
