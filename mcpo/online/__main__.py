"""Train with OnMC-PO: ``python -m mcpo.online --config FILE``, or under torchrun.

All options of ``python -m mcpo.train`` hold, but for ``train_data``, which the run makes itself.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from mcpo.cli import parse_args_of
from mcpo.judges.verdict import JudgeError
from mcpo.online.config import OnlineRun
from mcpo.online.server import GenerationError
from mcpo.train import through_the_door

WHAT = "Train a causal LM with OnMC-PO: generate, judge, train, again."


def main(argv: Sequence[str] | None = None) -> int:
    """Run a job; returns the exit code."""

    def load() -> Callable[[OnlineRun], object]:
        from mcpo.online.loop import run_online

        return run_online

    return through_the_door(
        lambda: parse_args_of(OnlineRun, "mcpo.online", WHAT, argv),
        load,
        (JudgeError, GenerationError),
    )


if __name__ == "__main__":
    sys.exit(main())
