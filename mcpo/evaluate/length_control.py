"""Length-controlled win rate (Dubois et al. 2024, arXiv 2404.04475): what the judge would say if
both answers were equally long.

A logistic model of the preferences,

    p(model wins on q) = sigmoid( length * tanh(d_q / std(d)) + difficulty * gamma_q + bias ),

d_q the baseline's length minus the model's in characters, gamma_q how hard the question is, known
beforehand. The length-controlled win rate is the mean prediction at d = 0. Judgments of answers
that were made long or short on purpose join the fit with a small weight, so that a model whose
lengths hardly vary does not get an arbitrary coefficient of length.
"""
# Q questions, G judgments of gamed answers, F = 3 features

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mcpo.evaluate.win_rate import checked_preferences

# Of AlpacaEval 2's published fit: lambda of the gamed judgments, halved as there are two models of
# them.
GAMED_WEIGHT = 0.2 / 2


@dataclass(frozen=True, kw_only=True, slots=True)
class GamedJudgments:
    """Judgments of answers made longer or shorter on purpose (AlpacaEval's df_gamed.csv)."""

    std_delta_length_G: NDArray[np.float64]
    difficulty_G: NDArray[np.float64]
    preference_G: NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class LengthModel:
    """The three coefficients, under the names of AlpacaEval's published weights."""

    length: float
    """Of tanh(std_delta_len): negative where longer answers win."""
    difficulty: float
    """Of instruction_difficulty."""
    bias: float
    """Of not_gamed_baseline: how good the model is besides."""

    def win_rate(self, difficulty_Q: ArrayLike) -> float:
        """Length-controlled win rate in percent: the mean prediction at equal lengths."""
        return 100 * float(_sigmoid(self.bias + self.difficulty * np.asarray(difficulty_Q)).mean())


def fit_length_model(
    preference_Q: ArrayLike,
    length_Q: ArrayLike,
    baseline_length_Q: ArrayLike,
    difficulty_Q: ArrayLike,
    gamed: GamedJudgments,
    *,
    l1_C: float | None = None,
) -> LengthModel:
    """Fit the model by maximum likelihood.

    Args:
        preference_Q: probability that the model wins; NaN, no verdict, is left out.
        length_Q: characters of the model's answers.
        baseline_length_Q: of the baseline's.
        difficulty_Q: of the questions.
        gamed: judgments that steady the coefficient of length.
        l1_C: inverse strength of an L1 penalty. The leaderboard chooses one by cross-validation,
            which moves a win rate by up to a tenth of a point; None fits without, so that the
            result depends on no split.

    Raises:
        ValueError: unequal numbers of questions, or answers that are all equally much longer.
        ModuleNotFoundError: scikit-learn is missing.
    """
    preference_Q = checked_preferences(preference_Q)
    arrays = [np.asarray(a, dtype=np.float64) for a in (length_Q, baseline_length_Q, difficulty_Q)]
    if any(array.shape != preference_Q.shape for array in arrays):
        shapes = [len(preference_Q), *(array.shape for array in arrays)]
        raise ValueError(
            "preferences, lengths, baseline lengths and difficulties must have one entry per "
            f"question, got {shapes}"
        )
    delta_Q = arrays[1] - arrays[0]
    spread = delta_Q.std(ddof=1)
    if not spread > 0:
        raise ValueError(
            "length control needs answers whose lengths differ from the baseline's by different "
            f"amounts, got the same difference, {delta_Q[0]}, for all; use the plain win rate"
        )
    decided_Q = ~np.isnan(preference_Q)
    own_QF = np.stack([np.tanh(delta_Q / spread), arrays[2], np.ones_like(delta_Q)], axis=1)
    # The third column, absent in gamed judgments, is what makes the bias the model's own.
    gamed_GF = np.stack(
        [np.tanh(gamed.std_delta_length_G), gamed.difficulty_G, np.zeros_like(gamed.difficulty_G)],
        axis=1,
    )
    coefficient_F = _fit(
        np.concatenate([own_QF[decided_Q], gamed_GF]),
        np.concatenate([preference_Q[decided_Q], gamed.preference_G]),
        np.concatenate(
            [np.ones(int(decided_Q.sum())), np.full(len(gamed.preference_G), GAMED_WEIGHT)]
        ),
        l1_C,
    )
    length, difficulty, bias = coefficient_F.tolist()
    return LengthModel(length=length, difficulty=difficulty, bias=bias)


def _fit(
    features: NDArray[np.float64],
    target: NDArray[np.float64],
    weight: NDArray[np.float64],
    l1_C: float | None,
) -> NDArray[np.float64]:
    """[F] coefficients of a logistic regression on probabilities."""
    try:
        from sklearn.linear_model import LogisticRegression
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "length-controlled win rates need scikit-learn, which is not installed; "
            "pip install 'mcpo[eval]'"
        ) from error
    options: dict[str, Any]
    if l1_C is None:
        options = {"C": np.inf, "solver": "newton-cholesky"}
    else:
        options = {"C": l1_C, "l1_ratio": 1.0, "solver": "liblinear", "random_state": 0}
    model = LogisticRegression(fit_intercept=False, tol=1e-10, max_iter=10_000, **options)
    # It takes classes and no probabilities: each row counts p times as won and 1 - p as lost.
    won, lost = np.ones(len(target)), np.zeros(len(target))
    model.fit(
        np.concatenate([features, features]),
        np.concatenate([won, lost]),
        sample_weight=np.concatenate([weight * target, weight * (1 - target)]),
    )
    return model.coef_[0]


def _sigmoid(logit: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.exp(-np.logaddexp(0, -logit))
