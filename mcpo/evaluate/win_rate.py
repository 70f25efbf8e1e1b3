"""Win rates against a baseline, with standard errors (Miller 2024, "Adding Error Bars to Evals").

A preference is the probability, in [0, 1], that a judge prefers the model's answer to the
baseline's; one half is a draw. NaN stands for a comparison without a verdict: it is left out and
counted, never taken for a draw.
"""
# Q questions

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mcpo.evaluate.statistics import Estimate


@dataclass(frozen=True, kw_only=True, slots=True)
class WinRate:
    """A model against a baseline; rates in percent, as leaderboards print them."""

    win_rate: float
    """Mean preference."""
    stderr: float
    """Of ``win_rate``: the sample's standard deviation over the root of its size."""
    discrete: float
    """Adjusted win rate (wins + draws / 2) / all, each preference rounded to win, draw or loss."""
    wins: int
    losses: int
    draws: int
    abstained: int
    """Comparisons without a verdict, which are in none of the above."""


def win_rate(preference_Q: ArrayLike) -> WinRate:
    """Summarise the preferences of one model.

    Raises:
        ValueError: a preference is outside [0, 1], or fewer than two have a verdict.
    """
    every_Q = checked_preferences(preference_Q)
    decided_Q = every_Q[~np.isnan(every_Q)]
    if len(decided_Q) < 2:
        raise ValueError(
            f"a win rate needs at least 2 verdicts, got {len(decided_Q)} of {len(every_Q)} "
            "comparisons; look at the judge's answers"
        )
    wins = int((decided_Q > 0.5).sum())
    losses = int((decided_Q < 0.5).sum())
    draws = len(decided_Q) - wins - losses
    return WinRate(
        win_rate=100 * float(decided_Q.mean()),
        stderr=100 * float(decided_Q.std(ddof=1)) / math.sqrt(len(decided_Q)),
        discrete=100 * (wins + draws / 2) / len(decided_Q),
        wins=wins,
        losses=losses,
        draws=draws,
        abstained=len(every_Q) - len(decided_Q),
    )


def paired_difference(first_Q: ArrayLike, second_Q: ArrayLike) -> Estimate:
    """Win rate of the first model minus that of the second on the same questions, in points.

    The error is that of the differences: questions that are hard for both do not widen it, which
    two separate errors would do (Miller 2024, section 4). Questions that either judge left open are
    left out.

    Raises:
        ValueError: other numbers of questions, or fewer than two with both verdicts.
    """
    one_Q, two_Q = checked_preferences(first_Q), checked_preferences(second_Q)
    if len(one_Q) != len(two_Q):
        raise ValueError(
            "a paired difference needs the same questions in the same order, got "
            f"{len(one_Q)} and {len(two_Q)}"
        )
    gap_Q = one_Q - two_Q
    gap_Q = gap_Q[~np.isnan(gap_Q)]
    if len(gap_Q) < 2:
        raise ValueError(
            f"a paired difference needs at least 2 questions with both verdicts, got {len(gap_Q)}"
        )
    return Estimate(
        mean=100 * float(gap_Q.mean()),
        stderr=100 * float(gap_Q.std(ddof=1)) / math.sqrt(len(gap_Q)),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class OverSeeds:
    """The same measurement over several training seeds."""

    mean: float
    std: float
    """Sample standard deviation between seeds; NaN for one seed."""
    num_seeds: int

    def __str__(self) -> str:
        """``mean (std)``, as papers print it."""
        return f"{self.mean:.2f} ({self.std:.2f})"


def over_seeds(values: Sequence[float]) -> OverSeeds:
    """Mean and sample standard deviation of one value per seed.

    Raises:
        ValueError: no value.
    """
    if not values:
        raise ValueError("the mean over seeds needs at least 1 value, got none")
    std = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
    return OverSeeds(mean=float(np.mean(values)), std=std, num_seeds=len(values))


def checked_preferences(preference_Q: ArrayLike) -> NDArray[np.float64]:
    """As an array.

    Raises:
        ValueError: one is outside [0, 1]; the message names it.
    """
    array_Q = np.asarray(preference_Q, dtype=np.float64)
    if array_Q.ndim != 1:
        raise ValueError(f"preferences must be one per question, got the shape {array_Q.shape}")
    # NaN compares false, so it passes.
    outside = np.flatnonzero((array_Q < 0) | (array_Q > 1))
    if len(outside):
        raise ValueError(
            "a preference must be a probability in [0, 1], or NaN without a verdict, got "
            f"{array_Q[outside[0]]} for question {outside[0]}; AlpacaEval's files hold "
            "1 + probability"
        )
    return array_Q
