"""The arms of TRL: the training step of its ``DPOTrainer``, as its own loop would call it.

The trainer is started by ``train()`` and stopped in front of its first step. Everything is then as
TRL makes it: collated batch, autocast, checkpointing, metrics. What is asked of it besides its
defaults: reference log-probs known beforehand, no reports, the device of the model, no cut at
``max_length``.
"""
# B sequences, L tokens, V vocabulary
# TRL is there with the extras "bench" and "dev" alone.
# pyright: reportMissingImports=false, reportUntypedBaseClass=false

from __future__ import annotations

import tempfile
import types
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.peers import Missing
from benchmarks.step.problem import CONFIG, Problem


class _Ready(Exception):
    """Raised in the place of the first step."""


class TrlStep:
    """A call is ``DPOTrainer.training_step`` on the batch of all pairs; it gives the loss.

    Args:
        problem: of pairs.
        model: changed.
        tokenizer: of which TRL asks the padding token.
        fused: TRL's own head; without it the logits of all positions are made, and its functions
            for log-probabilities and entropy are applied to them.
        checkpointed: TRL's default.

    Raises:
        Missing: TRL is not installed.
    """

    def __init__(
        self,
        problem: Problem,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        fused: bool,
        checkpointed: bool,
    ) -> None:
        try:
            from datasets import Dataset
            from trl.trainer.dpo_config import DPOConfig
            from trl.trainer.dpo_trainer import DPOTrainer
        except ModuleNotFoundError as error:
            raise Missing(f"the arms of TRL need {error.name}: pip install trl==1.16.0") from error

        prepared: list[tuple[Any, ...]] = []

        class Trainer(DPOTrainer):
            """Given token ids and reference log-probs, which it would compute from text."""

            def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
                return dataset

            def _precompute_ref_logps(self, dataset: Any, *_: Any, **__: Any) -> Any:
                return dataset

            def training_step(self, *arguments: Any, **options: Any) -> Any:
                """Keep what the first step is given, and stop."""
                if not prepared:
                    prepared.append((arguments, options))
                    raise _Ready
                return super().training_step(*arguments, **options)

        with tempfile.TemporaryDirectory() as folder:
            self._trainer = Trainer(
                model=model,
                args=DPOConfig(
                    output_dir=folder,
                    use_cpu=model.device.type == "cpu",
                    bf16=problem.autocast_dtype is not None,
                    report_to="none",
                    save_strategy="no",
                    disable_tqdm=True,
                    dataloader_pin_memory=False,
                    beta=CONFIG.loss.beta,
                    max_length=None,
                    max_steps=1,
                    per_device_train_batch_size=len(problem.groups),
                    precompute_ref_log_probs=True,
                    gradient_checkpointing=checkpointed,
                ),
                train_dataset=Dataset.from_list(_rows(problem)),
                processing_class=tokenizer,
            )
            if not fused:
                _materialize(model)
            with suppress(_Ready):
                self._trainer.train()
        self._arguments, self._options = prepared[0]

    def __call__(self) -> Tensor:
        """Forward, backward and TRL's metrics."""
        loss = self._trainer.training_step(*self._arguments, **self._options)
        assert isinstance(loss, Tensor)
        return loss


def _rows(problem: Problem) -> list[dict[str, Any]]:
    """In the columns that TRL's own preparation makes."""
    rows: list[dict[str, Any]] = []
    for group in problem.groups:
        chosen, rejected = (list(ids) for ids in group.candidate_ids)
        ref_chosen, ref_rejected = problem.reference[group.row_id]
        rows.append(
            {
                "prompt_ids": list(group.prompt_ids),
                "chosen_ids": chosen,
                "rejected_ids": rejected,
                "ref_chosen_logps": ref_chosen,
                "ref_rejected_logps": ref_rejected,
            }
        )
    return rows


def _materialize(model: PreTrainedModel) -> None:
    """Give TRL what it reads from its fused head, computed from stored logits."""
    from trl.trainer.utils import (
        FusedCausalLMOutput,
        entropy_from_logits,
        selective_log_softmax,
    )

    plain = type(model).forward

    def forward(
        self: PreTrainedModel, *, labels: Tensor, fused_lm_head: bool, **kwargs: Any
    ) -> Any:
        del fused_lm_head
        logits_BLV = plain(self, **kwargs).logits[:, :-1]
        labels_BL = labels[:, 1:]
        scored_BL = labels_BL != -100
        target_BL = labels_BL.clamp(min=0)
        logp_BL = selective_log_softmax(logits_BLV, target_BL)
        with torch.no_grad():
            entropy_BL = entropy_from_logits(logits_BLV)
            mean_BL = logits_BLV.mean(dim=-1)
            top_BL = logits_BLV.argmax(dim=-1) == target_BL
        return FusedCausalLMOutput(
            log_probs=logp_BL.masked_fill(~scored_BL, 0.0),
            entropy=entropy_BL.masked_fill(~scored_BL, 0.0),
            mean_logits=mean_BL.masked_fill(~scored_BL, 0.0),
            is_top1=top_BL & scored_BL,
            label_mask=scored_BL,
        )

    model.forward = types.MethodType(forward, model)
