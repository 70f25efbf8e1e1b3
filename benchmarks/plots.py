"""Time against memory, one figure for each weight: the same rows give the same bytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FormatStrFormatter, NullLocator

from benchmarks.cells import PATTERNS
from benchmarks.rows import Row
from benchmarks.tables import FEWEST, TITLES, best_way, by_shape, describe, memory

Weight = tuple[int, int]
MARKERS = "osD^v<>PXh*p"
COMPARED = {1: "one product", 2: "one product, and three of a third", 3: "three products"}
TIMES = (0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10, 20, 30, 50, 70, 100)
MEMORIES = (1, 3, 10, 30, 100, 300, 1000, 3000, 10000)


def draw(rows: Sequence[Row], folder: Path) -> dict[str, str]:
    """Write a figure for each weight, from its largest number of rows.

    Returns:
        Name of each file, and what it shows.
    """
    folder.mkdir(parents=True, exist_ok=True)
    largest: dict[Weight, int] = {}
    for row in rows:
        num_tokens, *weight = row.cell.shape
        key = (weight[0], weight[1])
        largest[key] = max(num_tokens, largest.get(key, 0))
    written: dict[str, str] = {}
    for (num_hidden, num_vocab), num_tokens in sorted(largest.items()):
        shape = (num_tokens, num_hidden, num_vocab)
        shown = [row for row in rows if row.cell.shape == shape]
        name = f"head-{num_hidden}x{num_vocab}.svg"
        # No date and fixed names of elements: an unchanged figure is an unchanged file.
        with mpl.rc_context({"svg.hashsalt": "mcpo"}):
            _figure(shown).savefig(folder / name, metadata={"Date": None, "Creator": None})
        written[name] = f"time against memory, {describe(shown[0].cell.shape)}"
    return written


def _figure(rows: list[Row]) -> Figure:
    """Patterns from left to right, dtypes from top to bottom."""
    groups = by_shape(rows)
    figure = Figure(figsize=(11, 3.4 * len(groups) + 1.3), layout="constrained")
    all_axes = figure.subplots(
        len(groups), len(PATTERNS), squeeze=False, sharex="col", sharey="all"
    )
    # By name, so that what one measures does not change the looks of another.
    titles = sorted({row.title for row in rows}, key=lambda title: (title[:4] != "mcpo", title))
    for line, ((_, dtype), group) in zip(all_axes, groups, strict=True):
        for axes, pattern in zip(line, PATTERNS, strict=True):
            _panel(axes, group, titles, pattern)
            axes.set_title(f"{TITLES[pattern]}, {dtype}", fontsize=10)
    handles = {
        label: handle
        for axes in all_axes.flat
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    shown = [title for title in titles if title in handles]
    figure.legend(
        [handles[title] for title in shown],
        shown,
        loc="outside lower center",
        ncols=3,
        fontsize=8,
        frameon=False,
    )
    for axes, pattern in zip(all_axes[-1], PATTERNS, strict=True):
        axes.set_xlabel(f"time / {COMPARED[FEWEST[pattern]]}", fontsize=9)
    for axes in all_axes[:, 0]:
        axes.set_ylabel("memory, MiB", fontsize=9)
    figure.suptitle(describe(rows[0].cell.shape), fontsize=11)
    return figure


def _panel(axes: Axes, rows: list[Row], titles: list[str], pattern: str) -> None:
    colours = mpl.colormaps["tab10"]
    for number, title in enumerate(titles):
        row = best_way(rows, title, pattern)
        if row is None:
            continue
        axes.scatter(
            [row.ratio(FEWEST[pattern])],
            [max(1.0, memory(row))],
            s=90 if row.ours else 45,
            marker=MARKERS[number % len(MARKERS)],
            facecolor=colours(number % 10) if row.ours else "none",
            edgecolor=colours(number % 10),
            linewidth=1.6,
            label=title,
        )
    axes.axvline(1.0, color="0.6", linewidth=0.8, linestyle="--")
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis, ticks in ((axes.xaxis, TIMES), (axes.yaxis, MEMORIES)):
        axis.set_major_locator(FixedLocator(ticks))
        axis.set_major_formatter(FormatStrFormatter("%g"))
        axis.set_minor_locator(NullLocator())
    axes.tick_params(labelsize=8)
    axes.grid(True, linewidth=0.3)
