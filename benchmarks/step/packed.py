"""The arms that are ours: ``mcpo``, ``mcpo_lazy`` and ``dpo``, steps of the trainer but updates."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.step.lazy import LAZY, visits_of
from benchmarks.step.problem import CONFIG, Problem
from mcpo.engine.single import SingleEngine
from mcpo.pack import move, pack, split_by_budget
from mcpo.policy import Policy
from mcpo.recompute import device_memory, resolve_recompute
from mcpo.step import StepWork, loss_on_batch, prompt_metrics


class PackedStep:
    """Scores all candidates of all groups, draws, and trains: a call gives the loss.

    Args:
        problem: whose draw the trainer makes itself.
        model: changed.
        mode: of recompute; ``auto`` is resolved as the trainer does.
        lazy: scores what chains ask for instead, and moves them.
    """

    def __init__(
        self, problem: Problem, model: PreTrainedModel, mode: str, *, lazy: bool = False
    ) -> None:
        device = model.device
        self._config = LAZY if lazy else CONFIG
        if mode == "auto":
            mode = resolve_recompute(
                self._config, problem.groups, model, device_memory(device, 1)
            ).mode
        self.mode = mode
        policy = Policy(
            model, head_impl="auto", autocast_dtype=problem.autocast_dtype, recompute=mode
        )
        # Never stepped: the update is the same work for every arm, and left out.
        optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
        self._engine = SingleEngine(policy.train(), optimizer, device)
        self._problem = problem
        budget = CONFIG.optim.max_tokens_per_micro_batch
        packed = problem.visited() if lazy else problem.groups
        self._batches = [
            (
                move(pack(groups, share_prefix=True), device),
                visits_of(groups, problem).to(device) if lazy else None,
            )
            for groups in split_by_budget(packed, budget, share_prefix=True)
        ]

    def __call__(self) -> Tensor:
        """Forward and backward of all micro-batches, and the metrics that are logged."""
        problem, config = self._problem, self._config
        total = torch.zeros((), device=self._engine.device)
        for batch, visits in self._batches:
            work = StepWork(step=problem.step, batches=(batch,), num_prompts=len(problem.groups))
            found = loss_on_batch(self._engine, batch, problem.references, config, work, visits)
            share = found.loss_P.sum() / len(problem.groups)
            self._engine.backward(share)
            metrics = prompt_metrics(found.loss_P, found.scored, found.draw, config.loss.beta)
            for values_P in metrics.values():
                values_P.detach().double().sum().item()
            total = total + share.detach()
        return total
