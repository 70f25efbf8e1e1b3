"""Rows of ``{"id", "prompt": [messages], "completions": [{"text", "rank", "model"?}, ...]}``."""

from __future__ import annotations

from mcpo.data.candidates import read_candidates
from mcpo.data.ranking import Ties
from mcpo.data.raw import RawRow
from mcpo.findings import Tally
from mcpo.records import CandidateRow


def read_ranked_messages(raw: RawRow, *, ties: Ties, tally: Tally) -> CandidateRow | None:
    """As ``candidates``, but the prompt must be messages and every completion must have a rank.

    Raises:
        ValueError: a column is missing or wrong, or there are fewer than two completions.
    """
    if not isinstance(raw.value("prompt"), list | tuple):
        raise raw.wrong("prompt", "a list of messages")
    for entry in raw.entries("completions"):
        entry.number("rank")
    return read_candidates(raw, ties=ties, tally=tally)
