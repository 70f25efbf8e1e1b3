"""Cost against the size of the pool, one figure for each model and dtype: the same rows give the
same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FormatStrFormatter, NullLocator

from benchmarks.step.arms import TRL_BEST
from benchmarks.step.bars import with_best
from benchmarks.step.points import Point
from benchmarks.step.rows import Row

Found = Mapping[Point, Mapping[str, Row]]
LINES = {
    "mcpo": ("tab:blue", "o", "-"),
    "mcpo_selective": ("tab:cyan", "s", "-"),
    "dpo": ("tab:green", "^", "--"),
    "dpo_padded": ("tab:olive", "v", "--"),
    "mcpo_naive": ("tab:orange", "D", "-"),
    "trl_default": ("tab:red", "x", "--"),
    TRL_BEST: ("tab:pink", "+", "--"),
}


def draw(found: Found, folder: Path) -> dict[str, str]:
    """Write a figure for each model and dtype of which lengths were measured with several pools.

    Returns:
        Name of each file, and what it shows.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written: dict[str, str] = {}
    for model, dtype in sorted({(point.model, point.dtype) for point in found}):
        panels = _panels(found, model, dtype)
        if not panels:
            continue
        name = f"step-{model}-{dtype}.svg"
        # No date and fixed names of elements: an unchanged figure is an unchanged file.
        with mpl.rc_context({"svg.hashsalt": "mcpo"}):
            figure = _figure(panels, f"{model}, {dtype}")
            figure.savefig(folder / name, metadata={"Date": None, "Creator": None})
        written[name] = f"time of a step against the size of the pool, {model}, {dtype}"
    return written


def _panels(found: Found, model: str, dtype: str) -> dict[str, dict[int, Mapping[str, Row]]]:
    """Arms by lengths and pool, where there are several pools."""
    panels: dict[tuple[int, int, str], dict[int, Mapping[str, Row]]] = {}
    for point, arms in found.items():
        if (point.model, point.dtype, point.data) == (model, dtype, ""):
            key = (point.prompt, point.completion, point.lengths)
            panels.setdefault(key, {})[point.pool] = with_best(arms)
    return {key[2]: pools for key, pools in sorted(panels.items()) if len(pools) > 1}


def _figure(panels: dict[str, dict[int, Mapping[str, Row]]], title: str) -> Figure:
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(5.5 * columns, 3.4 * lines + 0.9), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes, (lengths, pools) in zip(grid.flat, panels.items(), strict=False):
        _panel(axes, pools)
        axes.set_title(lengths, fontsize=10)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel("CPU seconds by thread", fontsize=9)
    for axes in grid[-1]:
        axes.set_xlabel("candidates in the pool", fontsize=9)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=11)
    return figure


def _panel(axes: Axes, pools: dict[int, Mapping[str, Row]]) -> None:
    for name, (colour, marker, style) in LINES.items():
        measured = {pool: arms[name].median for pool, arms in sorted(pools.items()) if name in arms}
        axes.plot(
            list(measured),
            list(measured.values()),
            color=colour,
            marker=marker,
            linestyle=style,
            linewidth=1.2,
            markersize=5,
            label=name,
        )
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(FixedLocator(sorted(pools)))
    axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.tick_params(labelsize=8)
    axes.grid(True, linewidth=0.3)
