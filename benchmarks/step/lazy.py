"""What the arm ``mcpo_lazy`` is given: three candidates of a pool, as ``scoring: lazy`` packs them.

They are the chosen one, the chain's state and its proposal, here three different ones, which is the
dearest a step can be: where the proposal is the state, as it is with the probability sum q^2, the
step is one of ``dpo``. The proposal is the problem's drawn negative, and is accepted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from benchmarks.step.problem import CONFIG, Problem
from mcpo.config import KernelConfig
from mcpo.mc_kernel import LazyBatch
from mcpo.records import TokenizedGroup

LAZY = replace(CONFIG, kernel=KernelConfig(num_negatives=1, scoring="lazy"))


def visits_of(groups: Sequence[TokenizedGroup], problem: Problem) -> LazyBatch:
    """Chains that stand in the candidate that is not drawn, and are offered the one that is.

    Args:
        groups: of ``problem.visited()``, in a micro-batch.
        problem: with the whole pool.
    """
    drawn_of = dict(zip((each.row_id for each in problem.groups), problem.drawn, strict=True))
    size_of = {each.row_id: each.num_candidates for each in problem.groups}
    drawn = [drawn_of[group.row_id] for group in groups]
    other = [
        next((column for column in group.columns[1:] if column != mine), mine)
        for group, mine in zip(groups, drawn, strict=True)
    ]
    size_P = torch.tensor([size_of[group.row_id] for group in groups])
    place_F = torch.arange(int(size_P.max()))
    columns = [torch.tensor(group.columns) for group in groups]
    return LazyBatch(
        known_PF=torch.zeros(len(groups), len(place_F), dtype=torch.float64),
        in_pool_PF=(place_F > 0) & (place_F < size_P[:, None]),
        age_PF=torch.ones(len(groups), len(place_F), dtype=torch.int64),
        column_PC=torch.nn.utils.rnn.pad_sequence(columns, batch_first=True),
        state_PM=torch.tensor(other)[:, None],
        proposal_PMK=torch.tensor(drawn)[:, None, None],
        # Of a uniform number that accepts whatever the ratio is.
        log_u_PMK=torch.full((len(groups), 1, 1), -torch.inf, dtype=torch.float64),
    )
