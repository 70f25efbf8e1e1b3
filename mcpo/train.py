"""Train with MC-PO: ``python -m mcpo.train --config FILE`` or ``torchrun --nproc-per-node 2 -m
mcpo.train``.

This module is the door: it reads the configuration, which needs no torch, and turns errors of the
caller into one line. The run itself is ``run.py``, its loop ``loop.py``, one step of it
``step.py``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from mcpo.cli import parse_args

# What a caller can mend; anything else is a defect of ours and shows its traceback.
CALLERS_ERRORS = (
    ValueError,
    # Files and folders: not there, in the way, not to be read or written, a full disk.
    OSError,
    ModuleNotFoundError,
    NotImplementedError,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a job; returns the exit code."""
    try:
        config = parse_args(argv)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    # OpenMP's threads spin between parallel regions by default, which on a machine with other work
    # makes a step several times slower and gains nothing on an idle one (docs/log.md). torch reads
    # this when it is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Only now, so that --help and a misspelt option answer at once.
    from mcpo.run import run
    from mcpo.step import NonFiniteError

    try:
        run(config)
    except CALLERS_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except NonFiniteError as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
