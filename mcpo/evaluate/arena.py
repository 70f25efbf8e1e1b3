"""Arena-Hard's verdicts: two games with the answers swapped, strong wins counted threefold.

Its judgment files (lmarena/arena-hard-auto, data/*/model_judgment/JUDGE/MODEL.jsonl) have a line
per question: {uid, category, judge, model, baseline, games: [game, game]}, in version 0.1
``question_id`` for ``uid`` and no baseline. A game is {score, ...} or null; in the first the
baseline is assistant A, in the second the model is.
"""
# R outcomes

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

STRONG_WIN_COUNTS = 3
_VERDICT = re.compile(r"\[\[\s*([AB](?:>>?|=|<<?)[AB])\s*\]\]")

# What assistant A gets of each verdict, and how often it counts.
_OF_A: dict[str, tuple[float, int]] = {
    "A>>B": (1.0, STRONG_WIN_COUNTS),
    "A>B": (1.0, 1),
    "A=B": (0.5, 1),
    "A<B": (0.0, 1),
    "A<<B": (0.0, STRONG_WIN_COUNTS),
}
_MIRRORED = {"B>>A": "A<<B", "B>A": "A<B", "B=A": "A=B", "B<A": "A>B", "B<<A": "A>>B"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Judgment:
    """Both games of one question."""

    uid: str
    model: str
    judge: str
    baseline: str
    """Empty where the file does not say."""
    category: str
    baseline_first: str | None
    """Verdict of the game where the baseline was assistant A; None without one."""
    model_first: str | None
    """Verdict of the game where the model was."""

    @property
    def outcomes(self) -> tuple[float, ...]:
        """What the model got: 1 a win, 0 a loss, 0.5 a draw, each as often as it counts.

        Empty unless both games have a verdict, so that no order weighs more than the other.
        """
        if self.baseline_first is None or self.model_first is None:
            return ()
        second, times_second = _OF_A[self.model_first]
        first, times_first = _OF_A[self.baseline_first]
        return (second,) * times_second + (1 - first,) * times_first


def parse_verdict(answer: str) -> str | None:
    """The last ``[[A>B]]``-like label of a judge's answer, with A before B; None without one."""
    found = _VERDICT.findall(answer.upper())
    return normalised(found[-1]) if found else None


def normalised(label: str) -> str | None:
    """A verdict's label with A before B; None for anything else."""
    label = _MIRRORED.get(label, label)
    return label if label in _OF_A else None


@dataclass(frozen=True, kw_only=True, slots=True)
class ArenaScore:
    """A model's score against its baseline in percent, with a bootstrap interval."""

    score: float
    lower: float
    """5th percentile over bootstrap samples."""
    upper: float
    """95th percentile."""
    num_questions: int
    skipped: int
    """Questions where a game has no verdict."""


def arena_score(
    judgments: Sequence[Judgment], *, num_bootstraps: int = 1000, seed: int = 0
) -> ArenaScore:
    """Mean outcome of the model.

    Arena-Hard resamples single outcomes, as if the two games and the triple counts of one question
    were independent; here questions are resampled whole, so the interval is the wider, honest one.
    The score itself is the same.

    Raises:
        ValueError: no question has both verdicts.
    """
    outcomes = [judgment.outcomes for judgment in judgments if judgment.outcomes]
    if not outcomes:
        raise ValueError(
            f"a score needs a question with verdicts in both games, got none of {len(judgments)}; "
            "look at the judge's answers"
        )
    total_Q = np.array([sum(each) for each in outcomes])
    count_Q = np.array([len(each) for each in outcomes])
    sampled = _bootstrap(total_Q, count_Q, num_bootstraps, seed)
    lower, upper = np.percentile(sampled, [5, 95])
    return ArenaScore(
        score=100 * float(total_Q.sum() / count_Q.sum()),
        lower=100 * float(lower),
        upper=100 * float(upper),
        num_questions=len(outcomes),
        skipped=len(judgments) - len(outcomes),
    )


def _bootstrap(
    total_Q: NDArray[np.float64], count_Q: NDArray[np.int64], num: int, seed: int
) -> NDArray[np.float64]:
    """[num] scores of questions drawn with replacement."""
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(total_Q), size=(num, len(total_Q)))
    return total_Q[drawn].sum(axis=1) / count_Q[drawn].sum(axis=1)


def read_judgments(path: Path) -> list[Judgment]:
    """One judge's verdicts on one model.

    Raises:
        ValueError: a line is no judgment, or the file holds several models or judges.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    judgments = [
        _judgment(line, path, number) for number, line in enumerate(lines, start=1) if line.strip()
    ]
    if not judgments:
        raise ValueError(f"{path} must hold at least one judgment, got an empty file")
    for name in ("model", "judge"):
        found = sorted({getattr(judgment, name) for judgment in judgments})
        if len(found) > 1:
            raise ValueError(f"{path} must have one {name}, got {', '.join(found)}; split the file")
    return judgments


def write_judgments(path: Path, judgments: Sequence[Judgment]) -> None:
    """The file that Arena-Hard's own ``show_result.py`` reads."""
    rows = [
        {
            "uid": judgment.uid,
            "category": judgment.category,
            "judge": judgment.judge,
            "model": judgment.model,
            "baseline": judgment.baseline,
            "games": [{"score": judgment.baseline_first}, {"score": judgment.model_first}],
        }
        for judgment in judgments
    ]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")


def _judgment(line: str, path: Path, number: int) -> Judgment:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {number}, must be JSON: {error}") from error
    uid = row.get("uid", row.get("question_id")) if isinstance(row, dict) else None
    games = row.get("games") if isinstance(row, dict) else None
    if not isinstance(uid, str) or not isinstance(games, list) or len(games) != 2:
        raise ValueError(
            f"{path}, line {number}, must be a judgment of Arena-Hard with a uid (or question_id) "
            "and two games"
        )
    return Judgment(
        uid=uid,
        model=str(row.get("model", "")),
        judge=str(row.get("judge", "")),
        baseline=str(row.get("baseline", "")),
        category=str(row.get("category", "")),
        baseline_first=_score_of(games[0], path, number),
        model_first=_score_of(games[1], path, number),
    )


def _score_of(game: Mapping[str, Any] | None, path: Path, number: int) -> str | None:
    label = game.get("score") if isinstance(game, dict) else None
    if label is None:
        return None
    verdict = normalised(str(label))
    if verdict is None:
        raise ValueError(
            f"{path}, line {number}: a score must be A>>B, A>B, A=B, B>A, B>>A or null, got "
            f"{label!r}"
        )
    return verdict
