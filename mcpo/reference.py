"""The reference policy: what stands in a log-ratio for the policy as it was.

===========  ===================================================================================
kind         log-probabilities of the reference
===========  ===================================================================================
precomputed  from disk, scored once before training (``reference_cache.py``)
live         scored in every step, without gradient, by a frozen copy of the weights; with adapters
             by the model itself, its adapters off or a frozen one on
none         zero, for losses and scores that have no reference
===========  ===================================================================================

A live reference may follow the policy (TR-DPO, arXiv 2404.09656): every few steps it becomes a mix
of the two. Where it stands then is part of a checkpoint.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from mcpo import adapters
from mcpo.config import Config
from mcpo.losses import needs_reference
from mcpo.policy import Policy, group_logps, mismatched_logps
from mcpo.records import PackedBatch


class Reference(Protocol):
    """What the step and the evaluation ask of a reference."""

    def of(self, batch: PackedBatch) -> Tensor:
        """[P, C] its log-probabilities, without gradient; 0 where there is no candidate."""
        ...

    def with_mismatched(self, batch: PackedBatch) -> tuple[Tensor, Tensor | None]:
        """The same, and [P] those of mismatched completions; None for a batch without."""
        ...


@dataclass(frozen=True, slots=True)
class NoReference:
    """For losses and scores of the policy's log-probabilities alone."""

    def of(self, batch: PackedBatch) -> Tensor:
        """[P, C] zeros."""
        return torch.zeros(batch.mask_PC.shape, device=batch.mask_PC.device)

    def with_mismatched(self, batch: PackedBatch) -> tuple[Tensor, None]:
        """[P, C] zeros; ``kto`` alone has mismatched completions, and it has a reference."""
        return self.of(batch), None


@dataclass(frozen=True, kw_only=True, slots=True)
class LiveReference:
    """A policy that scores the batches of training as they are, by the same forward."""

    policy: Policy
    instead: Callable[[], AbstractContextManager[None]] = nullcontext
    """Inside it the policy is the reference."""

    def of(self, batch: PackedBatch) -> Tensor:
        """[P, C] scored now."""
        return self.with_mismatched(batch)[0]

    @torch.no_grad()
    def with_mismatched(self, batch: PackedBatch) -> tuple[Tensor, Tensor | None]:
        """[P, C] and [P] of one forward."""
        with self.instead():
            logp_S = self.policy(batch)
        mismatched_P = None if batch.mismatched_P is None else mismatched_logps(logp_S, batch)
        return group_logps(logp_S, batch), mismatched_P


@dataclass(frozen=True, kw_only=True, slots=True)
class ReferenceSync:
    """Every ``steps`` optimizer steps: reference <- alpha * policy + (1 - alpha) * reference.

    Soft update of arXiv 2404.09656, equation 4, at alpha < 1 and hard update, equation 5, at 1. The
    tensors are the parameters themselves, by name.
    """

    policy: Mapping[str, Tensor]
    reference: Mapping[str, Tensor]
    alpha: float
    steps: int

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """To be called after each step, with the number of steps done."""
        if step % self.steps == 0:
            for name, tensor in self.reference.items():
                tensor.lerp_(self.policy[name], self.alpha)

    def state_dict(self) -> dict[str, Tensor]:
        """The weights of the reference."""
        return dict(self.reference)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put the reference where it was.

        Raises:
            ValueError: these are not its weights.
        """
        if set(state) != set(self.reference):
            raise ValueError(
                "a checkpoint must hold the weights of the reference that follows the policy, got "
                f"{len(state)} of {len(self.reference)}; start anew in another output_dir"
            )
        for name, tensor in self.reference.items():
            tensor.copy_(state[name])


def resolved_kind(config: Config) -> str:
    """Which kind of reference a run has: "precomputed", "live" or "none".

    Raises:
        ValueError: none is asked for, and the loss or the score of the draw needs one; or a sync
            that adapters cannot make.
    """
    asked, needed_by = config.reference.reference, _needed_by(config)
    if asked == "none" and needed_by:
        raise ValueError(
            f"reference: none needs a loss and a score without a reference, got {needed_by}; "
            "give reference: auto, or other ones"
        )
    lazy = config.kernel.scoring == "lazy" and config.kernel.score != "log_ratio"
    if lazy and (config.reference.sync_ref_model or asked == "live"):
        raise ValueError(
            f"scoring: lazy with score: {config.kernel.score} begins with log-probabilities of the "
            "reference that are known before training; set reference: precomputed, or score: "
            "log_ratio"
        )
    if config.reference.sync_ref_model:
        if config.adapter.adapts and config.reference.ref_model_mixup_alpha != 1:
            raise ValueError(
                "adapters can follow the policy by hard updates alone, since a mix of two products "
                "B A is no product of their rank: ref_model_mixup_alpha must be 1 with use_peft, "
                f"got {config.reference.ref_model_mixup_alpha}"
            )
        return "live"
    if asked != "auto":
        return asked
    return "precomputed" if needed_by else "none"


def _needed_by(config: Config) -> str:
    """What of the configuration needs a reference, or an empty text."""
    needs = []
    if needs_reference(config.loss):
        needs.append(f"loss_type: {', '.join(config.loss.loss_type)}")
    if config.kernel.score == "log_ratio":
        needs.append("score: log_ratio")
    elif config.kernel.scoring == "lazy":
        needs.append("scoring: lazy, whose chains begin with the reference's scores")
    return " and ".join(needs)


def keeps_adapter(config: Config) -> bool:
    """Whether a frozen adapter is the reference: the policy begins with a trained one, or it moves.

    A fresh adapter adds nothing yet, so that the base alone is the policy as it begins.
    """
    loaded = config.adapter.adapter_name_or_path is not None
    moves = config.reference.sync_ref_model
    return config.adapter.adapts and resolved_kind(config) == "live" and (loaded or moves)


def as_it_began(policy: Policy, config: Config) -> Callable[[], AbstractContextManager[None]]:
    """What makes a policy that has not been trained yet the one to be scored as reference.

    A fresh adapter adds exactly nothing. Off it saves its work, and what is scored is then bit for
    bit what a run without adapters scores and keeps.
    """
    if config.adapter.adapts and config.adapter.adapter_name_or_path is None:
        return partial(adapters.without_adapters, policy.model)
    return nullcontext


def live_reference(policy: Policy, config: Config) -> tuple[LiveReference, ReferenceSync | None]:
    """The policy as it is now, kept, and what moves it if it is to move.

    To be called before the first update.
    """
    if keeps_adapter(config):
        instead = partial(adapters.with_reference_adapter, policy.model)
        reference = LiveReference(policy=policy, instead=instead)
        tensors = [
            adapters.read(policy.model, name) for name in (adapters.POLICY, adapters.REFERENCE)
        ]
    elif config.adapter.adapts:
        return LiveReference(policy=policy, instead=as_it_began(policy, config)), None
    else:
        frozen = copy.deepcopy(policy).requires_grad_(False)
        reference = LiveReference(policy=frozen)
        tensors = [dict(each.model.named_parameters()) for each in (policy, frozen)]
    if not config.reference.sync_ref_model:
        return reference, None
    sync = ReferenceSync(
        policy=tensors[0],
        reference=tensors[1],
        alpha=config.reference.ref_model_mixup_alpha,
        steps=config.reference.ref_model_sync_steps,
    )
    return reference, sync


def reference_weights(policy: Policy, config: Config) -> dict[str, Tensor]:
    """The weights that ``as_it_began`` scores with, to be hashed before the first update."""
    weights = adapters.base_weights(policy.model)
    if config.adapter.adapter_name_or_path is not None:
        weights |= adapters.read(policy.model)
    return weights


def described(policy: Policy, config: Config) -> dict[str, Any]:
    """What decides the reference's values besides the weights of the base, for keys of caches."""
    if config.adapter.adapter_name_or_path is None:
        return {}
    settings = adapters.settings_of(policy.model).to_dict()
    names = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
    return {"adapter": {name: settings[name] for name in names}}
