"""Rows of ``{"id", "prompt", "completions": [{"text", "rank"?, "score"?, "model"?,
"finished"?}, ...]}``; ``"finished": false`` marks a text that was cut at a length limit.
"""

from __future__ import annotations

from mcpo.data.conversation import read_prompt
from mcpo.data.ranking import Ties, best_first
from mcpo.data.raw import RawRow
from mcpo.findings import Tally
from mcpo.records import Candidate, CandidateRow


def read_candidates(raw: RawRow, *, ties: Ties, tally: Tally) -> CandidateRow | None:
    """The best completion by rank, or by score where ranks are missing, against the others.

    Raises:
        ValueError: a column is missing or wrong, or there are fewer than two completions.
    """
    candidates = [
        Candidate(
            text=entry.text("text"),
            rank=entry.optional_number("rank"),
            score=entry.optional_number("score"),
            model=entry.optional_text("model"),
            finished=entry.optional_flag("finished", default=True),
        )
        for entry in raw.entries("completions")
    ]
    if len(candidates) < 2:
        raise ValueError(
            f"{raw.where}: column 'completions' must hold at least two, the best and its pool, "
            f"got {len(candidates)}"
        )
    return best_first(raw, read_prompt(raw, "prompt"), candidates, ties=ties, tally=tally)
