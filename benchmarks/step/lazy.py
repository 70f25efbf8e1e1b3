"""The arm ``mcpo_lazy``: a step with ``scoring: lazy``, which packs three candidates of a pool.

They are the chosen one, the chain's state and its proposal, here three different ones, which is the
dearest a step can be: where the proposal is the state, as it is with the probability sum q^2, the
step is one of ``dpo``. The proposal is the problem's drawn negative, and is accepted.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.step.problem import CONFIG, Problem
from mcpo.config import KernelConfig
from mcpo.engine.single import SingleEngine
from mcpo.mc_kernel import LazyBatch
from mcpo.pack import pack, split_by_budget
from mcpo.policy import Policy
from mcpo.recompute import device_memory, resolve_recompute
from mcpo.records import TokenizedGroup
from mcpo.step import StepWork, loss_on_batch, prompt_metrics

LAZY = replace(CONFIG, kernel=KernelConfig(num_negatives=1, scoring="lazy"))


class LazyStep:
    """Scores what the chains ask for, moves them, and trains: a call gives the loss.

    Args:
        problem: with the whole pool.
        model: changed.
    """

    def __init__(self, problem: Problem, model: PreTrainedModel) -> None:
        cpu = torch.device("cpu")
        self.mode = resolve_recompute(LAZY, problem.groups, model, device_memory(cpu, 1)).mode
        policy = Policy(
            model, head_impl="auto", autocast_dtype=problem.autocast_dtype, recompute=self.mode
        )
        # Never stepped: the update is the same work for every arm, and left out.
        optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
        self._engine = SingleEngine(policy.train(), optimizer, cpu)
        self._problem = problem
        self._batches = [
            (pack(groups, share_prefix=True), _visits(groups, problem))
            for groups in split_by_budget(
                problem.visited(), LAZY.optim.max_tokens_per_micro_batch, share_prefix=True
            )
        ]

    def __call__(self) -> Tensor:
        """Forward and backward of all micro-batches, and the metrics that are logged."""
        problem, total = self._problem, torch.zeros(())
        for batch, visits in self._batches:
            work = StepWork(step=problem.step, batches=(batch,), num_prompts=len(problem.groups))
            found = loss_on_batch(self._engine, batch, problem.references, LAZY, work, visits)
            share = found.loss_P.sum() / len(problem.groups)
            self._engine.backward(share)
            metrics = prompt_metrics(found.loss_P, found.scored, found.draw, LAZY.loss.beta)
            for values_P in metrics.values():
                values_P.detach().double().sum().item()
            total = total + share.detach()
        return total


def _visits(groups: list[TokenizedGroup], problem: Problem) -> LazyBatch:
    """Chains that stand in the candidate that is not drawn, and are offered the one that is."""
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
