"""Runs jobs in processes of their own: a compiler that dies takes one job with it, not the rest."""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")


class _Worker(Generic[Job, Result]):
    def __init__(self, context: Any, work: Callable[[Job], Result]) -> None:
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(work, theirs), daemon=True)
        self.process.start()
        # Otherwise the end of the process would not end the pipe.
        theirs.close()

    def stop(self) -> None:
        self.process.terminate()
        self.process.join()
        self.pipe.close()


def run_jobs(
    work: Callable[[Job], Result],
    jobs: Iterable[Job],
    count: int,
    died: Callable[[Job, int], Result],
) -> Iterator[Result]:
    """Results in the order in which they come.

    Args:
        work: a function at the top of a module, so that another process can import it. It should
            return failures and not raise them: an exception ends its process.
        jobs: its arguments, which can be pickled.
        count: processes at a time.
        died: makes the result of a job whose process ended, from the job and the exit code.
    """
    waiting = deque(jobs)
    # A fresh interpreter: a fork of a process with threads may hang.
    context = get_context("spawn")
    busy: dict[Connection, tuple[_Worker[Job, Result], Job]] = {}
    idle: list[_Worker[Job, Result]] = []
    try:
        while waiting or busy:
            while waiting and len(busy) < count:
                worker = idle.pop() if idle else _Worker[Job, Result](context, work)
                job = waiting.popleft()
                worker.pipe.send(job)
                busy[worker.pipe] = worker, job
            for pipe in wait(list(busy)):
                worker, job = busy.pop(pipe)  # pyright: ignore[reportArgumentType]
                try:
                    result = worker.pipe.recv()
                except (EOFError, ConnectionResetError):
                    worker.process.join()
                    result = died(job, worker.process.exitcode or 0)
                else:
                    idle.append(worker)
                yield result
    finally:
        for worker in [*idle, *(worker for worker, _ in busy.values())]:
            worker.stop()


def _serve(work: Callable[[Any], Any], pipe: Connection) -> None:
    # Ctrl-C reaches every process of a terminal; the one that started these stops them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        pipe.send(work(job))
