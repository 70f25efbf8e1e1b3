"""Smaller pools, as the paper's studies of pool quality and pool size have them.

Kinds of findings. Candidates dropped: ``top_ranked``, ``over_pool_size``. Rows dropped:
``empty_pool``.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mcpo.findings import Tally
from mcpo.records import Candidate, CandidateRow
from mcpo.streams import raw_numbers


def shrink_pool(
    row: CandidateRow, *, drop_top_k: int, max_pool_size: int | None, seed: int, tally: Tally
) -> CandidateRow | None:
    """The row with a smaller pool, or None where none is left of it.

    First the ``drop_top_k`` best of the pool go. If more than ``max_pool_size`` are left, as many
    are drawn by seed and row id; a larger limit keeps all that a smaller one does.

    Raises:
        ValueError: the best are to go and the pool is not ranked.
    """
    pool = row.pool
    if drop_top_k:
        order = _best_first(row)
        dropped = set(order[:drop_top_k])
        pool = tuple(one for index, one in enumerate(pool) if index not in dropped)
        for _ in dropped:
            tally.add("top_ranked", row.row_id)
    if max_pool_size is not None and len(pool) > max_pool_size:
        for _ in range(len(pool) - max_pool_size):
            tally.add("over_pool_size", row.row_id)
        keys = raw_numbers(f"{seed}/pool/{row.row_id}", len(pool))
        kept = np.sort(np.argsort(keys, kind="stable")[:max_pool_size])
        pool = tuple(pool[index] for index in kept)
    if not pool:
        tally.add("empty_pool", row.row_id)
        return None
    return replace(row, pool=pool)


def _best_first(row: CandidateRow) -> list[int]:
    """Places of the pool by rank, or by score where ranks are missing."""
    badness = _badness(row.pool)
    if badness is None:
        raise ValueError(
            f"row {row.row_id!r}: drop_top_k needs a pool that is ranked or scored throughout, and "
            "this one is not; set drop_top_k to 0 or leave the row out"
        )
    return sorted(range(len(badness)), key=badness.__getitem__)


def _badness(pool: tuple[Candidate, ...]) -> list[float] | None:
    ranks = [one.rank for one in pool if one.rank is not None]
    if len(ranks) == len(pool):
        return ranks
    scores = [-one.score for one in pool if one.score is not None]
    return scores if len(scores) == len(pool) else None
