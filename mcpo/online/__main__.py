"""Train with OnMC-PO: ``python -m mcpo.online --config FILE``, or under torchrun.

All options of ``python -m mcpo.train`` hold, but for ``train_data``, which the run makes itself.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from mcpo.cli import parse_args_of
from mcpo.online.config import OnlineRun
from mcpo.train import CALLERS_ERRORS

WHAT = "Train a causal LM with OnMC-PO: generate, judge, train, again."


def main(argv: Sequence[str] | None = None) -> int:
    """Run a job; returns the exit code."""
    try:
        config = parse_args_of(OnlineRun, "mcpo.online", WHAT, argv)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    # As mcpo/train.py does, before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from mcpo.judges.verdict import JudgeError
    from mcpo.online.loop import run_online
    from mcpo.online.server import GenerationError
    from mcpo.step import NonFiniteError

    try:
        run_online(config)
    except (*CALLERS_ERRORS, JudgeError, GenerationError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except NonFiniteError as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
