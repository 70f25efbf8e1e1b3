"""Rows of steps as Markdown tables."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from benchmarks.step.arms import TRL_BEST, named
from benchmarks.step.bars import Bar, bars, flop_ratio, time_ratio, with_best
from benchmarks.step.points import Point
from benchmarks.step.rows import Row
from benchmarks.tables import NOTHING, markdown

Found = Mapping[Point, Mapping[str, Row]]
COMPARED = ("dpo", "dpo_padded", "mcpo_naive", "trl_default", TRL_BEST)


def one_point(arms: Mapping[str, Row]) -> str:
    """Every arm: time, memory, operations, errors."""
    best = with_best(arms).get(TRL_BEST)
    table = [
        [
            "arm",
            "step",
            "backward computes again",
            "s",
            "of mcpo",
            "MiB",
            "GFLOP",
            "GFLOP/s by thread",
            "loss error",
            "gradient error",
            "others, cores",
        ]
    ]
    for name, row in arms.items():
        arm = named(name)
        star = " (trl_best)" if best is row else ""
        threads = 1 if row.point.device == "cuda" else row.provenance.threads
        table.append(
            [
                f"`{name}`{star}",
                arm.title,
                row.recompute,
                _number(row.median),
                _ratio(time_ratio(arms, name, "mcpo")),
                NOTHING if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.0f}",
                f"{row.flops / 1e9:.0f}",
                f"{row.flops / 1e9 / row.median / threads:.0f}",
                f"{row.errors['loss']:.1e}",
                f"{row.errors['gradient']:.1e}",
                f"{statistics.median(row.others):.1f}",
            ]
        )
    return markdown(table)


def bars_of(arms: Mapping[str, Row]) -> str:
    """Measured values beside their limits, and the ratio of FLOPs."""
    counted = flop_ratio(arms)
    time = time_ratio(arms, "mcpo", "dpo")
    lines = [
        "| bar | measured | limit | kept |",
        "|---|---|---|---|",
        *map(_bar, bars(arms)),
    ]
    if counted is not None and time is not None:
        lines += ["", f"mcpo / dpo: {time:.2f} of the time, {counted:.2f} of the FLOPs."]
    return "\n".join(lines)


def by_pool(found: Found) -> str:
    """For every length and pool: the time of MC-PO, and its ratio to that of each other arm."""
    head = ["model", "lengths", "dtype", "pool", "recompute", "mcpo s"]
    table = [[*head, *(f"/ {name}" for name in COMPARED), "bars kept"]]
    for point, arms in sorted(found.items(), key=lambda each: order(each[0])):
        if "mcpo" not in arms:
            continue
        every = with_best(arms)
        kept = bars(arms)
        table.append(
            [
                point.model,
                point.lengths,
                point.dtype,
                str(point.pool),
                arms["mcpo"].recompute,
                _number(arms["mcpo"].median),
                *(_compared(every, name) for name in COMPARED),
                f"{sum(bar.passed for bar in kept)} of {len(kept)}",
            ]
        )
    return markdown(table)


def order(point: Point) -> tuple[object, ...]:
    """Synthetic lengths first, short ones before long ones."""
    return (point.data, point.model, point.prompt, point.completion, point.dtype, point.pool)


def details(found: Found) -> str:
    """A heading and two tables for every point."""
    parts = [
        f"### {point}\n\n{bars_of(arms)}\n\n{one_point(arms)}"
        for point, arms in sorted(found.items(), key=lambda each: order(each[0]))
    ]
    return "\n\n".join(parts)


def _compared(arms: Mapping[str, Row], name: str) -> str:
    """Time of MC-PO over that of an arm, and in brackets the same of operations."""
    time = time_ratio(arms, "mcpo", name)
    if time is None:
        return NOTHING
    return f"{time:.2f} ({arms['mcpo'].flops / arms[name].flops:.2f})"


def _bar(bar: Bar) -> str:
    sign = "<=" if bar.at_most else ">="
    kept = "yes" if bar.passed else "**no**"
    return f"| {bar.name} | {bar.measured:.2f} | {sign} {bar.limit:.2f} | {kept} |"


def _number(value: float) -> str:
    return f"{value:.3g}"


def _ratio(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.2f}"
