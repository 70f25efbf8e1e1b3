"""The proof of the statistics: published figures of AlpacaEval 2, computed again from its records.

A folder of records holds, per leaderboard entry, 805 preferences and answer lengths
(``alpacaeval2_preferences.csv.gz``), the published figures (``alpacaeval2_published.json``), the
difficulty of each question (``instruction_difficulty.csv``), judgments of gamed answers
(``df_gamed_reconstructed.csv.gz``) and recorded answers of the judge
(``alpacaeval2_judge_records.jsonl``).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mcpo.evaluate.alpaca import preference_of_logprobs
from mcpo.evaluate.length_control import GamedJudgments, LengthModel, fit_length_model
from mcpo.evaluate.win_rate import win_rate

if TYPE_CHECKING:
    import pandas

# The published fit chose its L1 penalty by cross-validation, whose folds are not published, and
# stopped early. So these two are bounds on the leaderboard's own noise, in points.
LIMIT_REFITTED = 0.11
LIMIT_WITH_L1 = 0.011
# Published figures have about 14 digits, weights 16; recorded log-probs have 10.
LIMIT_EXACT = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """One leaderboard entry: ours, and how far it is from what was published."""

    model: str
    win_rate: float
    stderr: float
    discrete: float
    length_controlled: float
    exact_error: float
    """Largest error among win rate, standard error, discrete win rate, wins, losses and draws."""
    weights_error: float
    """Of the length-controlled win rate, from the published weights."""
    refitted_error: float
    """From weights fitted here, without a penalty."""
    l1_error: float
    """From weights fitted here with the leaderboard's penalty."""

    @property
    def holds(self) -> bool:
        """Whether every error is within its limit."""
        return (
            max(self.exact_error, self.weights_error) <= LIMIT_EXACT
            and self.refitted_error <= LIMIT_REFITTED
            and self.l1_error <= LIMIT_WITH_L1
        )


def compare_with_published(
    folder: Path, on_model: Callable[[int], None] = lambda _: None
) -> list[Comparison]:
    """Every entry, in the order of the published file.

    Raises:
        FileNotFoundError: a file of the records is missing; the message names it.
        ModuleNotFoundError: pandas or scikit-learn is missing.
    """
    table = _read_csv(folder / "alpacaeval2_preferences.csv.gz")
    published = json.loads(_there(folder / "alpacaeval2_published.json").read_text())
    difficulty_Q = read_difficulty(folder / "instruction_difficulty.csv")
    gamed = read_gamed(folder / "df_gamed_reconstructed.csv.gz")
    results: list[Comparison] = []
    for model, figures in published.items():
        rows = table.loc[table["model"] == model].set_index("index").sort_index()
        results.append(_compare(model, figures, rows, difficulty_Q, gamed))
        on_model(1)
    return results


def judge_records_error(folder: Path) -> tuple[int, float]:
    """How many recorded answers of the judge there are, and the largest error of a preference.

    The judge saw the answers in random order and the record does not keep it, so either reading of
    "m" may be the recorded one.
    """
    text = _there(folder / "alpacaeval2_judge_records.jsonl").read_text()
    records = [json.loads(line) for line in text.splitlines()]
    worst = 0.0
    for record in records:
        readings = [
            preference_of_logprobs(record["top_logprobs"], model_is=model, baseline_is=baseline)
            for model, baseline in (("m", "M"), ("M", "m"))
        ]
        worst = max(worst, min(abs(record["preference"] - 1 - each) for each in readings))
    return len(records), worst


def read_difficulty(path: Path) -> NDArray[np.float64]:
    """[Q] of AlpacaEval's instruction_difficulty.csv, in the order of the questions."""
    table = _read_csv(path).set_index("index").sort_index()
    return table["instruction_difficulty"].to_numpy()


def read_gamed(path: Path) -> GamedJudgments:
    """AlpacaEval's df_gamed.csv."""
    table = _read_csv(path)
    return GamedJudgments(
        std_delta_length_G=table["std_delta_len"].to_numpy(),
        difficulty_G=table["instruction_difficulty"].to_numpy(),
        preference_G=table["preference"].to_numpy(),
    )


def _compare(
    model: str,
    figures: Mapping[str, Any],
    rows: pandas.DataFrame,
    difficulty_Q: NDArray[np.float64],
    gamed: GamedJudgments,
) -> Comparison:
    preference_Q = rows["preference"].replace(0, 1.5).to_numpy() - 1
    ours = win_rate(preference_Q)
    lengths = (preference_Q, rows["len_2"].to_numpy(), rows["len_1"].to_numpy(), difficulty_Q)
    refitted = fit_length_model(*lengths, gamed)
    with_l1 = fit_length_model(*lengths, gamed, l1_C=figures["sklearn_C_chosen_by_cv"])
    weights = figures["glm_weights"]
    from_weights = LengthModel(
        length=weights["np.tanh(std_delta_len)"],
        difficulty=weights["instruction_difficulty"],
        bias=weights["not_gamed_baseline"],
    )
    errors = [
        abs(mine - figures[name])
        for mine, name in (
            (ours.win_rate, "win_rate"),
            (ours.stderr, "standard_error"),
            (ours.discrete, "discrete_win_rate"),
            (ours.wins, "n_wins"),
            (ours.losses, "n_wins_base"),
            (ours.draws, "n_draws"),
        )
    ]
    target = figures["length_controlled_winrate"]
    return Comparison(
        model=model,
        win_rate=ours.win_rate,
        stderr=ours.stderr,
        discrete=ours.discrete,
        length_controlled=refitted.win_rate(difficulty_Q),
        exact_error=float(np.max(errors)),
        weights_error=abs(from_weights.win_rate(difficulty_Q) - target),
        refitted_error=abs(refitted.win_rate(difficulty_Q) - target),
        l1_error=abs(with_l1.win_rate(difficulty_Q) - target),
    )


def _read_csv(path: Path) -> pandas.DataFrame:
    import pandas

    return pandas.read_csv(_there(path))


def _there(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"the records need {path.name}, which is not in {path.parent}")
    return path


def worst(results: Sequence[Comparison]) -> dict[str, float]:
    """The largest error of each kind over all entries."""
    names = ("exact_error", "weights_error", "refitted_error", "l1_error")
    return {name: max(getattr(result, name) for result in results) for name in names}
