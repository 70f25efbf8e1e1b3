"""Rows of results as Markdown tables: every implementation, then ours against the best other."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from itertools import groupby

from benchmarks.cells import PATTERNS, TWO_PASSES, Shape
from benchmarks.rows import Row

TITLES = {"score": "score", "train": "train", "mcpo": "MC-PO"}
NOTHING = "-"
# What the time of a pattern is compared with to find the best implementation: the fewest products
# that do the job.
FEWEST = {"score": 1, "train": 3, "mcpo": 2}


def all_shapes(rows: Sequence[Row]) -> str:
    """A heading and a table for every shape and dtype."""
    parts = [
        f"### {describe(shape)}, {dtype}\n\n{one_shape(list(group))}"
        for (shape, dtype), group in by_shape(rows)
    ]
    return "\n\n".join(parts)


def by_shape(rows: Iterable[Row]) -> list[tuple[tuple[Shape, str], list[Row]]]:
    """Rows of each shape and dtype; small weights first, then few rows, then bf16."""

    def order(row: Row) -> tuple[int, int, int, str]:
        shape = row.cell.shape
        return (shape.num_hidden, shape.num_vocab, shape.num_tokens, row.cell.dtype)

    ordered = sorted(rows, key=order)
    found = groupby(ordered, key=lambda row: (row.cell.shape, row.cell.dtype))
    return [(key, list(group)) for key, group in found]


def describe(shape: Shape) -> str:
    """A shape in words."""
    return f"N = {shape.num_tokens}, D = {shape.num_hidden}, V = {shape.num_vocab}"


def best_way(rows: Iterable[Row], title: str, pattern: str) -> Row | None:
    """The faster way in which an implementation does a pattern, if it was measured."""
    found = [row for row in rows if row.title == title and row.cell.pattern == pattern]
    return min(found, key=_compared, default=None)


def one_shape(rows: list[Row]) -> str:
    """Ours first, then the others from fast to slow, then those with a scalar loss."""

    def order(title: str) -> tuple[bool, bool, float]:
        first = next(row for row in rows if row.title == title)
        found = [best_way(rows, title, pattern) for pattern in ("train", "score", "mcpo")]
        speed = next(_compared(row) for row in found if row is not None)
        # Sorting is stable, which keeps ours in the order they were measured in.
        return (not first.ours, first.scalar, 0.0 if first.ours else speed)

    titles = sorted(dict.fromkeys(row.title for row in rows), key=order)
    head = [
        "implementation",
        "score s (x of 1)",
        "train s (x of 4, of 3)",
        "MC-PO s (x of 2)",
        "MiB score, train, MC-PO",
        "value error",
        "gradient error",
        "others, cores",
    ]
    return markdown([head, *(_implementation(rows, title) for title in titles)])


def ours_against_the_best(rows: Sequence[Row]) -> str:
    """For every shape, dtype and pattern: the fastest other, and how ours compare with it."""
    names = list(dict.fromkeys(row.title for row in rows if row.ours))
    factors = [f"{name}: time, memory" for name in names]
    table = [["N, D, V", "dtype", "pattern", "fastest other", "s", "MiB", *factors]]
    for (shape, dtype), group in by_shape(rows):
        for pattern in PATTERNS:
            other = fastest_other(group, pattern)
            if other is None:
                continue
            ours = [best_way(group, name, pattern) for name in names]
            table.append(
                [
                    ", ".join(map(str, shape)),
                    dtype,
                    TITLES[pattern],
                    _named(other),
                    _seconds(other.median),
                    _mib(other),
                    *(NOTHING if row is None else _factors(other, row) for row in ours),
                ]
            )
    return markdown(table)


def fastest_other(rows: Iterable[Row], pattern: str) -> Row | None:
    """The implementation that is not ours and takes least; a scalar loss does not do the job."""
    found = [row for row in rows if row.cell.pattern == pattern and not (row.ours or row.scalar)]
    return min(found, key=_compared, default=None)


def markdown(table: Sequence[Sequence[str]]) -> str:
    """A table, its first row being the head, with columns as wide as they must be."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |"
        for row in table
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def memory(row: Row) -> float:
    """MiB, not less than 0: pages of a result that nothing was written to do not count."""
    return max(0.0, row.memory_mib)


def _implementation(rows: list[Row], title: str) -> list[str]:
    found = {pattern: best_way(rows, title, pattern) for pattern in PATTERNS}
    there = [row for row in found.values() if row is not None]
    times = {pattern: NOTHING if row is None else _time(row) for pattern, row in found.items()}
    gradients = [row.gradient_error for row in there]
    return [
        f"**{title}**" if there[0].ours else title,
        *times.values(),
        ", ".join(NOTHING if row is None else _mib(row) for row in found.values()),
        f"{max(row.errors['value'] or 0.0 for row in there):.1e}",
        _error(max((error for error in gradients if error is not None), default=None)),
        f"{max(statistics.median(row.others) for row in there):.1f}",
    ]


def _time(row: Row) -> str:
    products = {"score": (1,), "train": (4, 3), "mcpo": (2,)}[row.cell.pattern]
    ratios = ", ".join(f"{row.ratio(count):.2f}" for count in products)
    way = f", {row.cell.way}" if row.cell.way == TWO_PASSES else ""
    return f"{_seconds(row.median)} ({ratios}){way}"


def _named(row: Row) -> str:
    return f"{row.title}, {row.cell.way}" if row.cell.pattern == "mcpo" else row.title


def _factors(other: Row, ours: Row) -> str:
    time = _compared(other) / _compared(ours)
    return f"{time:.2f}x, {_rounded(memory(other) / max(1.0, memory(ours)))}x"


def _compared(row: Row) -> float:
    return row.ratio(FEWEST[row.cell.pattern])


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g}"


def _mib(row: Row) -> str:
    return f"{memory(row):.0f}"


def _error(error: float | None) -> str:
    return NOTHING if error is None else f"{error:.1e}"


def _rounded(factor: float) -> str:
    """Two digits that count."""
    digits = max(0, 1 - math.floor(math.log10(factor))) if factor > 0 else 0
    return f"{factor:.{digits}f}"
