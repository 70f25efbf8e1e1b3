"""Measure one point and print it.

    python -m benchmarks.step --model smollm2-135m --prompt 256 --completion 128 --pool 5

``--json FILE`` writes one object:

    point        what was measured
    seconds      of each arm, and of trl_best: median CPU seconds by thread; of a GPU its own
    peak_bytes   of each arm, beyond the weights; null with --no_memory
    recompute    of each arm, what its backward computes again
    trl_best     the arm of TRL that it stands for
    flops        of each arm, counted (flops.py)
    flop_ratio   of mcpo to dpo
    ratios       {"seconds": {arm: mcpo / arm}, "peak_bytes": {arm: mcpo / arm}}
    bars         [{"name", "measured", "limit", "at_most", "passed"}]
    errors       of each arm, and what the gate allows
    rounds       how many, all arms in each
    provenance   date, commit, machine
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks import provenance
from benchmarks.cells import DEVICES, parse_names
from benchmarks.peers import Missing
from benchmarks.step import arms, bars, rows, session, tables
from benchmarks.step.points import DTYPES, MODELS, QUICK, Point
from benchmarks.step.rows import Row

THREADS = 2


def main(argv: list[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.no_time and (options.no_memory or options.json or options.device != "cpu"):
        print("error: --no_time goes with none of --no_memory, --json, --device", file=sys.stderr)
        return 2
    if options.device == "cuda" and not torch.cuda.is_available():
        print(
            "error: --device cuda needs a CUDA or ROCm device, and torch sees none", file=sys.stderr
        )
        return 2
    command = provenance.command("python -m benchmarks.step", arguments)
    origin = provenance.collect(command, options.device)
    results: Path = options.results or _results(options)
    try:
        point = _point(options)
        chosen = [arms.named(name) for name in _names(options)]
        if options.no_time:
            for row in session.memory_rows(point, chosen, options.data, origin):
                rows.append([row], results)
                print(f"{row.arm} ({row.recompute}): {row.peak_bytes} bytes", flush=True)
            return 0
        ready = session.prepare(point, chosen, options.data, _say)
    except (ValueError, FileNotFoundError, Missing) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    peaks = {} if options.no_memory else ready.peaks()
    _rounds(ready, options.rounds, options.budget)
    found = ready.rows(peaks, origin)
    rows.append(found, results)
    by_arm = {row.arm: row for row in found}
    print(tables.one_point(by_arm))
    print(tables.bars_of(by_arm))
    if options.json:
        options.json.write_text(json.dumps(as_json(by_arm), indent=1) + "\n")
    return 0


def _results(options: argparse.Namespace) -> Path:
    if options.quick:
        return rows.QUICK
    return rows.CUDA if options.device == "cuda" else rows.FULL


def as_json(found: Mapping[str, Row]) -> dict[str, Any]:
    """The object of ``--json``."""
    every = bars.with_best(found)
    first = next(iter(found.values()))
    best = every.get(arms.TRL_BEST)
    return {
        "point": dataclasses.asdict(first.point),
        "seconds": {name: row.median for name, row in every.items()},
        "peak_bytes": {name: row.peak_bytes for name, row in every.items()},
        "recompute": {name: row.recompute for name, row in every.items()},
        "trl_best": best.arm if best else None,
        "flops": {name: row.flops for name, row in every.items()},
        "flop_ratio": bars.flop_ratio(found),
        "ratios": {
            "seconds": {name: bars.time_ratio(every, "mcpo", name) for name in every},
            "peak_bytes": {name: bars.memory_ratio(every, "mcpo", name) for name in every},
        },
        "bars": [{**dataclasses.asdict(bar), "passed": bar.passed} for bar in bars.bars(found)],
        "errors": {name: row.errors for name, row in found.items()},
        "rounds": len(first.seconds),
        "provenance": dataclasses.asdict(first.provenance),
    }


def _rounds(ready: session.Session, most: int, budget: float) -> None:
    """As many as there is time for, and one at least."""
    began = time.monotonic()
    for number in range(most):
        ready.round(number)
        passed = time.monotonic() - began
        _say(f"round {number + 1} of {most}")
        # One more would take as long as those before took on average.
        if passed * (number + 2) / (number + 1) > budget:
            break


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step", description="The price of a training step"
    )
    parser.add_argument("--model", help=f"{', '.join(MODELS)}, a folder or a Hugging Face name")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="bf16: autocast")
    parser.add_argument("--device", choices=DEVICES, default="cpu", help="default: cpu")
    parser.add_argument("--prompt", type=int, default=256, help="tokens")
    parser.add_argument("--completion", type=int, default=128, help="tokens of each candidate")
    parser.add_argument("--pool", type=int, default=5, help="candidates besides the chosen one")
    parser.add_argument("--groups", type=int, default=1, help="prompts of the step")
    parser.add_argument("--data", type=Path, help="file of candidate rows in place of lengths")
    parser.add_argument("--arms", help=f"out of {', '.join(arms.NAMES)} (default: all)")
    parser.add_argument(
        "--scoring",
        choices=("full", "lazy"),
        default="full",
        help=f"lazy: without --arms, {', '.join(arms.LAZY_NAMES)}",
    )
    parser.add_argument("--rounds", type=int, default=5, help="each times every arm once")
    parser.add_argument(
        "--budget", type=float, default=math.inf, help="seconds that all rounds may take"
    )
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--no_memory", action="store_true", help="time alone")
    parser.add_argument("--no_time", action="store_true", help="memory alone")
    parser.add_argument("--quick", action="store_true", help="a tiny model; rows do not count")
    parser.add_argument("--results", type=Path, help="file that rows are appended to")
    parser.add_argument("--json", type=Path, help="file for one object with all results")
    return parser


def _names(options: argparse.Namespace) -> tuple[str, ...]:
    if options.arms is None:
        return arms.LAZY_NAMES if options.scoring == "lazy" else arms.NAMES
    return parse_names(options.arms, arms.NAMES, "--arms")


def _point(options: argparse.Namespace) -> Point:
    """What the options name.

    Raises:
        ValueError: a size is out of range.
        FileNotFoundError: there is no such file of rows.
    """
    if options.quick:
        return dataclasses.replace(QUICK[0], dtype=options.dtype, device=options.device)
    for name, least in (("prompt", 1), ("completion", 2), ("pool", 1), ("groups", 1)):
        if getattr(options, name) < least:
            raise ValueError(f"--{name} must be at least {least}, got {getattr(options, name)}")
    data: Path | None = options.data
    if data is not None and not data.exists():
        raise FileNotFoundError(f"--data must name a file, got {data}")
    return Point(
        model=options.model or MODELS[0],
        dtype=options.dtype,
        prompt=options.prompt if data is None else 0,
        completion=options.completion if data is None else 0,
        pool=options.pool,
        groups=options.groups,
        data="" if data is None else data.name,
        device=options.device,
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
