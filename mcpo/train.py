"""Train with MC-PO: ``python -m mcpo.train --config FILE`` or ``torchrun --nproc-per-node 2 -m
mcpo.train``.

This module is the door: it reads the configuration, which needs no torch, and turns errors of the
caller into one line. The run itself is ``run.py``, its loop ``loop.py``, one step of it
``step.py``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

from mcpo.cli import parse_args
from mcpo.config import Config

# What a caller can mend; anything else is a defect of ours and shows its traceback.
CALLERS_ERRORS = (
    ValueError,
    # Files and folders: not there, in the way, not to be read or written, a full disk.
    OSError,
    ModuleNotFoundError,
    NotImplementedError,
)


C = TypeVar("C")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a job; returns the exit code."""

    def load() -> Callable[[Config], object]:
        from mcpo.run import run

        return run

    return through_the_door(lambda: parse_args(argv), load)


def through_the_door(
    read: Callable[[], C],
    load: Callable[[], Callable[[C], object]],
    further_errors: tuple[type[Exception], ...] = (),
) -> int:
    """Read a configuration and run it; returns the exit code.

    Args:
        read: gives the configuration, without torch.
        load: imports torch, and gives what runs.
        further_errors: of the caller, beside ``CALLERS_ERRORS``.
    """
    try:
        config = read()
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    # OpenMP's threads spin between parallel regions by default, which on a machine with other work
    # makes a step several times slower and gains nothing on an idle one (docs/log.md). torch reads
    # this when it is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Only now, so that --help and a misspelt option answer at once.
    run = load()
    from mcpo.step import NonFiniteError

    try:
        run(config)
    except (*CALLERS_ERRORS, *further_errors) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except NonFiniteError as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
