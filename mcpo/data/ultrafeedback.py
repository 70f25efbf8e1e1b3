"""UltraFeedback's columns: ``instruction`` and four ``completions`` with scores."""

from __future__ import annotations

from statistics import fmean
from typing import Literal

from mcpo.data.ranking import Ties, best_first
from mcpo.data.raw import RawRow
from mcpo.findings import Tally
from mcpo.records import Candidate, CandidateRow

ScoreField = Literal["fine-grained_score", "overall_score", "aspect_mean"]


def read_ultrafeedback(
    raw: RawRow, *, score_field: ScoreField, ties: Ties, tally: Tally
) -> CandidateRow | None:
    """The highest score is chosen; what has no score is dropped (``unrated_completion``).

    Raises:
        ValueError: a column is missing or wrong.
    """
    prompt = raw.text("instruction")
    candidates: list[Candidate] = []
    for entry in raw.entries("completions"):
        score = _aspect_mean(entry) if score_field == "aspect_mean" else _score(entry, score_field)
        if score is None:
            tally.add("unrated_completion", raw.row_id)
            continue
        candidates.append(
            Candidate(text=entry.text("response"), score=score, model=entry.optional_text("model"))
        )
    if not candidates:
        tally.add("empty_pool", raw.row_id)
        return None
    return best_first(raw, prompt, candidates, ties=ties, tally=tally)


def _score(entry: RawRow, column: str) -> float | None:
    """The column, which must be there but may be null."""
    return None if entry.value(column) is None else entry.number(column)


def _aspect_mean(entry: RawRow) -> float | None:
    """Mean ``Rating`` of the aspects in ``annotations`` where it is a number, such as ``"4"``."""
    annotations = entry.entry("annotations")
    ratings: list[float] = []
    for aspect in annotations.values:
        if not annotations.has(aspect):
            continue
        rating = str(annotations.entry(aspect).value("Rating"))
        # The raters wrote "N/A" where an aspect does not apply.
        if rating.replace(".", "", 1).isdecimal():
            ratings.append(float(rating))
    return fmean(ratings) if ratings else None
