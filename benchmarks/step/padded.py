"""The arms ``dpo_padded`` and ``mcpo_naive``: every candidate behind a copy of its prompt, padded.

They have the head of ours, on completion rows alone, and the attention that transformers gives a
model by default. What they lack is what packing, sharing and the one forward bring.
"""
# S sequences, L tokens of the longest, N scored tokens, P prompts, C candidates

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.step.problem import CONFIG, Problem
from mcpo.losses import loss_named
from mcpo.pack import move, pack
from mcpo.policy import HeadScaling, ScoringHead, disable_dropout, group_logps, logits_mb
from mcpo.records import PackedBatch, ScoredBatch, TokenizedGroup
from mcpo.step import prompt_metrics


@dataclass(frozen=True, kw_only=True, slots=True)
class Padded:
    """Groups as rows of one length."""

    token_SL: Tensor
    attended_SL: Tensor
    scored_N: Tensor
    """Indices into the flattened rows."""
    batch: PackedBatch
    """Targets and the place of each sequence among its prompt's candidates."""


def pad(groups: tuple[TokenizedGroup, ...], device: torch.device) -> Padded:
    """Pad on the right with token 0 to the longest of all."""
    rows = [
        torch.tensor([*group.prompt_ids, *ids]) for group in groups for ids in group.candidate_ids
    ]
    attended = [torch.ones_like(row) for row in rows]
    token_SL = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    width = token_SL.shape[1]
    prompts = [len(group.prompt_ids) for group in groups for _ in group.candidate_ids]
    scored = [
        torch.arange(prompt - 1, len(row) - 1) + number * width
        for number, (row, prompt) in enumerate(zip(rows, prompts, strict=True))
    ]
    return Padded(
        token_SL=token_SL.to(device),
        attended_SL=torch.nn.utils.rnn.pad_sequence(attended, batch_first=True).to(device),
        scored_N=torch.cat(scored).to(device),
        batch=move(pack(groups, share_prefix=False), device),
    )


class PaddedStep:
    """A step on pairs, or one that scores the pool first and then trains the pairs it draws.

    Args:
        problem: of pairs, if ``naive`` is not set.
        model: changed.
        checkpointed: the backward runs every layer again, as transformers' own switch has it.
        naive: the problem's groups are scored without gradient to draw the pairs.
    """

    def __init__(
        self, problem: Problem, model: PreTrainedModel, *, checkpointed: bool, naive: bool
    ) -> None:
        projection = model.get_output_embeddings()
        assert isinstance(projection, torch.nn.Linear)
        self._head = ScoringHead(projection, HeadScaling.of(model.config), "auto")
        # As much as the packed step that keeps as much of its layers.
        self._head.cache_mb = logits_mb("selective" if checkpointed else "light")
        disable_dropout(model)
        if checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": False})
        self._model = model.train()
        self._problem = problem
        self._all = pad(problem.groups, model.device)
        self._naive = naive

    def __call__(self) -> Tensor:
        """Forward and backward, and the metrics that are logged."""
        problem, padded = self._problem, self._all
        if self._naive:
            with torch.no_grad():
                logp_PC = self._logps(padded)
            draw = problem.draw(logp_PC, padded.batch)
            columns = draw.negative_PM[:, 0].tolist()
            # As drawn, not as known beforehand: a draw that differs is for the gate to find.
            problem = Problem(
                groups=problem.groups,
                reference=problem.reference,
                step=problem.step,
                drawn=tuple(columns),
                dtype=problem.dtype,
            ).pairs()
            padded = pad(problem.groups, self._model.device)
        logp_PC = self._logps(padded)
        draw = problem.draw(logp_PC, padded.batch)
        scored = ScoredBatch(
            logp_PC=logp_PC,
            ref_logp_PC=problem.references.of(padded.batch),
            length_PC=padded.batch.length_PC,
            mask_PC=padded.batch.mask_PC,
            negative_PM=draw.negative_PM,
            negative_mask_PM=draw.mask_PM,
        )
        loss_P = loss_named("dpo")(scored, CONFIG.loss)
        loss = loss_P.mean()
        loss.backward()
        metrics = prompt_metrics(loss_P, scored, draw, CONFIG.loss.beta)
        for values_P in metrics.values():
            values_P.detach().double().sum().item()
        return loss.detach()

    def _logps(self, padded: Padded) -> Tensor:
        """[P, C], from one forward over all rows."""
        dtype = self._problem.autocast_dtype
        with torch.autocast(self._model.device.type, dtype=dtype, enabled=dtype is not None):
            hidden_SLD = self._model.base_model(
                input_ids=padded.token_SL, attention_mask=padded.attended_SL, use_cache=False
            ).last_hidden_state
            hidden_ND = hidden_SLD.flatten(0, 1).index_select(0, padded.scored_N)
            return group_logps(self._head(hidden_ND, padded.batch), padded.batch)
