"""Which completion is chosen and which are its rivals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from mcpo.data.raw import RawRow
from mcpo.findings import Tally
from mcpo.records import Candidate, CandidateRow, Message

Ties = Literal["drop_rivals", "drop_row", "keep"]


def best_first(
    raw: RawRow,
    prompt: str | tuple[Message, ...],
    candidates: Sequence[Candidate],
    *,
    ties: Ties,
    tally: Tally,
) -> CandidateRow | None:
    """The best candidate against the others: lowest rank, or highest score where ranks are missing.

    Equals keep the order they came in. What ties with the best is no rival of it: by ``ties`` the
    rival (``tied_with_chosen``) or the row (``tied_row``) is dropped, or the first one chosen.

    Raises:
        ValueError: neither every candidate has a rank nor every one a score.
    """
    badness = _badness(raw, candidates)
    order = sorted(range(len(candidates)), key=badness.__getitem__)
    chosen, rivals = candidates[order[0]], order[1:]
    pool: list[Candidate] = []
    for index in rivals:
        # The same text again is no tie: with_pool counts it as repeated.
        tied = badness[index] == badness[order[0]] and candidates[index].text != chosen.text
        if tied and ties == "drop_row":
            tally.add("tied_row", raw.row_id)
            return None
        if tied and ties == "drop_rivals":
            tally.add("tied_with_chosen", raw.row_id)
        else:
            pool.append(candidates[index])
    return with_pool(raw, prompt, chosen, pool, tally=tally)


def with_pool(
    raw: RawRow,
    prompt: str | tuple[Message, ...],
    chosen: Candidate,
    pool: Sequence[Candidate],
    *,
    tally: Tally,
) -> CandidateRow | None:
    """The row without texts met before (``repeated_completion``), or None (``empty_pool``)."""
    seen = {chosen.text}
    rivals: list[Candidate] = []
    for rival in pool:
        if rival.text in seen:
            tally.add("repeated_completion", raw.row_id)
        else:
            seen.add(rival.text)
            rivals.append(rival)
    if not rivals:
        tally.add("empty_pool", raw.row_id)
        return None
    return CandidateRow(row_id=raw.row_id, prompt=prompt, chosen=chosen, pool=tuple(rivals))


def _badness(raw: RawRow, candidates: Sequence[Candidate]) -> list[float]:
    """Lower is better."""
    ranks = [one.rank for one in candidates if one.rank is not None]
    if len(ranks) == len(candidates):
        return ranks
    scores = [-one.score for one in candidates if one.score is not None]
    if len(scores) == len(candidates):
        return scores
    raise ValueError(
        f"{raw.where}: every completion must have a 'rank' (1 is best) or every one a 'score' "
        f"(larger is better), got {len(ranks)} ranks and {len(scores)} scores for "
        f"{len(candidates)} completions"
    )
