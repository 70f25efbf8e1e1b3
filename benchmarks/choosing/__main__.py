"""Writes the figures of docs/choosing.md, and its tables in their places there.

python -m benchmarks.choosing
"""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks.choosing.shapes import draw
from benchmarks.choosing.toy import Outcome, train
from mcpo.cli import make_config
from mcpo.config import LOSS_TYPES, SMOOTHED, Config

DOCS = Path(__file__).parents[2] / "docs"
# Rewards of a few units, as those of long completions are with the usual 0.1.
BETA = 0.5
EXTRA = {
    "rnce": {"strategy": "random"},
    # With a softer target the rated ones barely train on so few steps.
    "nca_rated": {"rating_temperature": 0.2},
    "infonca": {"rating_temperature": 0.2},
}
SAMPLERS = {
    "mc": {},
    "max": {"strategy": "max"},
    "min": {"strategy": "min"},
    "random": {"strategy": "random"},
    "mc, temperature 0.2": {"temperature": 0.2},
    "mc, 3 negatives": {"num_negatives": 3},
    "augmented": {"augmented": True},
}
PLACES = ("nearest", "2nd", "3rd", "4th", "farthest")
# With one negative alone, the nearest, as in pairs of two nearly equal answers.
REMEDIES: dict[str, dict[str, object]] = {
    "`dpo`": {"loss_type": "dpo"},
    "`simpo`": {"loss_type": "simpo"},
    "`dpo`, `sft_weight: 0.2`": {"loss_type": "dpo", "sft_weight": 0.2},
    "`dpo`, `sft_weight: 1`": {"loss_type": "dpo", "sft_weight": 1.0},
    "`cdpo`, `label_smoothing: 0.1`": {"loss_type": "cdpo", "label_smoothing": 0.1},
    "`ipo_sum`": {"loss_type": "ipo_sum"},
    "`nca`": {"loss_type": "nca"},
    "`sppo`": {"loss_type": "sppo"},
    "`apo_zero`": {"loss_type": "apo_zero"},
    "`orpo`": {"loss_type": "orpo"},
}


def config_of(name: str) -> Config:
    """The configuration that a row of the table of losses is of."""
    smoothing = {"label_smoothing": 0.1} if name in SMOOTHED else {}
    return make_config({"loss_type": name, "beta": BETA} | smoothing | EXTRA.get(name, {}))


def loss_row(name: str, outcome: Outcome) -> str:
    """A row of the table of losses."""
    moved = outcome.moved_Y.tolist()
    values = (moved[0], moved[1], moved[5], outcome.outside, outcome.margin)
    return f"| `{name}` | {' | '.join(f'{value:+.1f}' for value in values)} |"


def sampler_row(name: str, outcome: Outcome) -> str:
    """A row of the table of samplers."""
    shares = (f"{share:.0%}".rstrip("%") for share in outcome.pool_draws)
    draws = "all of them" if name == "augmented" else " / ".join(shares)
    moved = " | ".join(f"{value:+.1f}" for value in outcome.moved_Y[:6].tolist())
    return f"| {name} | {draws} | {moved} | {outcome.outside:+.1f} |"


def falls_row(name: str, outcome: Outcome) -> str:
    """A row of the table of pairs."""
    moved = outcome.moved_Y.tolist()
    values = (moved[0], moved[1], outcome.outside, outcome.margin)
    return f"| {name} | {' | '.join(f'{value:+.1f}' for value in values)} |"


def tables() -> dict[str, str]:
    """Each table by the name of its place."""
    head = "| loss | chosen | nearest negative | farthest negative | not in the data | margin |"
    losses = [head, "|---|---|---|---|---|---|"]
    losses += [loss_row(name, train(config_of(name))) for name in LOSS_TYPES]
    samplers = [
        f"| draws | percent of the draws, nearest first | chosen | {' | '.join(PLACES)} "
        "| not in the data |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, options in SAMPLERS.items():
        samplers.append(sampler_row(name, train(make_config({"beta": BETA} | options))))
    falls = ["| loss | chosen | its negative | not in the data | margin |", "|---|---|---|---|---|"]
    for name, options in REMEDIES.items():
        falls.append(falls_row(name, train(make_config({"beta": BETA} | options), pool=1)))
    found = {"losses": losses, "samplers": samplers, "falls": falls}
    return {place: "\n".join(lines) for place, lines in found.items()}


def main() -> None:
    """Write them."""
    page = DOCS / "choosing.md"
    text = page.read_text()
    for place, table in tables().items():
        marks = rf"(<!-- {place} -->\n).*?(<!-- end -->)"
        filled = f"\\1{table}\n\\2"
        text, count = re.subn(marks, filled, text, flags=re.DOTALL)
        assert count == 1, f"{page} must have one place for the table {place}, got {count}"
    page.write_text(text)
    (DOCS / "figures").mkdir(exist_ok=True)
    shapes = {name: make_config(_shown(name)).loss for name in LOSS_TYPES}
    draw(shapes, DOCS / "figures" / "losses.svg")


def _shown(name: str) -> dict[str, object]:
    """What the figure is of: the usual beta, and ratings that are nearly sure."""
    options = config_of(name).loss
    return {
        "loss_type": name,
        "label_smoothing": options.label_smoothing,
        "rating_temperature": options.rating_temperature,
        **({"strategy": "random"} if name == "rnce" else {}),
    }


if __name__ == "__main__":
    main()
