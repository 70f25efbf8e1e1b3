"""A figure of every loss against the log-probabilities of a pair: the same code, the same bytes."""
# C candidates of a pair: the chosen one and a negative

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator
from torch import Tensor

from mcpo.config import LossConfig
from mcpo.losses import LOSSES
from mcpo.records import ScoredBatch

# Both completions have as many tokens and this log-probability under the reference.
LENGTH, REFERENCE = 20, -40.0
MOVES = torch.linspace(-30, 30, 31, dtype=torch.float64)
COLUMNS = 4


def draw(configs: dict[str, LossConfig], path: Path) -> None:
    """Write a panel for each loss: its value where one of the pair has moved from the reference."""
    lines = -(-len(configs) // COLUMNS)
    figure = Figure(figsize=(11, 1.9 * lines + 0.7), layout="constrained")
    grid = figure.subplots(lines, COLUMNS, squeeze=False)
    for axes, (name, config) in zip(grid.flat, configs.items(), strict=False):
        _panel(axes, name, config)
    for axes in list(grid.flat)[len(configs) :]:
        axes.set_visible(False)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    for axes in grid[-1]:
        axes.set_xlabel("change of the log-probability, nats", fontsize=8)
    # No date and fixed names of elements: an unchanged figure is an unchanged file.
    with mpl.rc_context({"svg.hashsalt": "mcpo", "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None, "Creator": None})


def _panel(axes: Axes, name: str, config: LossConfig) -> None:
    nothing = torch.zeros_like(MOVES)
    chosen = value(name, config, MOVES, nothing)
    negative = value(name, config, nothing, MOVES)
    axes.plot(MOVES, chosen, color="tab:blue", linewidth=1.3, label="of the chosen alone")
    axes.plot(MOVES, negative, color="tab:orange", linewidth=1.3, label="of the negative alone")
    axes.axvline(0, color="grey", linewidth=0.5)
    axes.set_title(name, fontsize=10)
    axes.xaxis.set_major_locator(FixedLocator([-30, 0, 30]))
    axes.yaxis.set_major_locator(MaxNLocator(2))
    axes.tick_params(labelsize=7)


def value(name: str, config: LossConfig, chosen_P: Tensor, negative_P: Tensor) -> Tensor:
    """[P] the loss of pairs whose completions have moved by so much from the reference."""
    moved_PC = torch.stack([chosen_P, negative_P], dim=1)
    ref_logp_PC = torch.full_like(moved_PC, REFERENCE)
    batch = ScoredBatch(
        logp_PC=ref_logp_PC + moved_PC,
        ref_logp_PC=ref_logp_PC,
        length_PC=torch.full(moved_PC.shape, LENGTH),
        mask_PC=torch.ones(moved_PC.shape, dtype=torch.bool),
        negative_PM=torch.ones(len(moved_PC), 1, dtype=torch.int64),
        negative_mask_PM=torch.ones(len(moved_PC), 1, dtype=torch.bool),
        mean_chosen_length=LENGTH,
        rating_PC=torch.tensor([1.0, 0.0], dtype=torch.float64).expand(moved_PC.shape),
    )
    return LOSSES[name](batch, config)
