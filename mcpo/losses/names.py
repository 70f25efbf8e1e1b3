"""The losses by name, each with what it looks at; the terms of a configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from mcpo.config import LossConfig
from mcpo.losses import listwise, pairwise, reference_free, unpaired
from mcpo.losses.negatives import over_pool
from mcpo.records import ScoredBatch


@dataclass(frozen=True, kw_only=True, slots=True)
class Loss:
    """A function of a batch and what it needs. Called, it sees the negatives that it is for."""

    value: Callable[[ScoredBatch, LossConfig], Tensor]
    """[P]; differentiable in the log-probabilities of the chosen one and of the batch's negatives,
    and of no other candidate: the others have no backward."""
    negatives: Literal["drawn", "pool"]
    """Those that it is given: what the MC kernel drew, or every candidate of the pool."""
    reference: bool
    """Whether the reference's log-probabilities change its value."""
    ratings: bool = False
    """Whether every candidate must have one."""

    def __call__(self, batch: ScoredBatch, config: LossConfig) -> Tensor:
        """[P] the loss of each prompt."""
        return self.value(over_pool(batch) if self.negatives == "pool" else batch, config)


LOSSES: dict[str, Loss] = {
    "mcpo": Loss(value=listwise.mcpo, negatives="drawn", reference=True),
    "mcpo_unbiased": Loss(value=listwise.mcpo_unbiased, negatives="drawn", reference=True),
    "rnce": Loss(value=listwise.rnce, negatives="drawn", reference=True),
    "dpo": Loss(value=pairwise.dpo, negatives="drawn", reference=True),
    "rpo": Loss(value=pairwise.rpo, negatives="drawn", reference=True),
    "cdpo": Loss(value=pairwise.cdpo, negatives="drawn", reference=True),
    "robust": Loss(value=pairwise.robust, negatives="drawn", reference=True),
    "exo": Loss(value=pairwise.exo, negatives="drawn", reference=True),
    "hinge": Loss(value=pairwise.hinge, negatives="drawn", reference=True),
    "ipo": Loss(value=pairwise.ipo, negatives="drawn", reference=True),
    "ipo_sum": Loss(value=pairwise.ipo_sum, negatives="drawn", reference=True),
    "bco": Loss(value=unpaired.bco, negatives="drawn", reference=True),
    "kto": Loss(value=unpaired.kto, negatives="drawn", reference=True),
    "apo_zero": Loss(value=unpaired.apo_zero, negatives="drawn", reference=True),
    "apo_down": Loss(value=unpaired.apo_down, negatives="drawn", reference=True),
    "sppo": Loss(value=unpaired.sppo, negatives="drawn", reference=True),
    "nca": Loss(value=unpaired.nca, negatives="drawn", reference=True),
    "nca_rated": Loss(value=listwise.nca_rated, negatives="pool", reference=True, ratings=True),
    "infonca": Loss(value=listwise.infonca, negatives="pool", reference=True, ratings=True),
    "simpo": Loss(value=reference_free.simpo, negatives="drawn", reference=False),
    "cpo": Loss(value=reference_free.cpo, negatives="drawn", reference=False),
    "orpo": Loss(value=reference_free.orpo, negatives="drawn", reference=False),
    "sft": Loss(value=reference_free.sft, negatives="drawn", reference=False),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Term:
    """A loss of a weighted sum."""

    name: str
    weight: float
    loss: Loss


def loss_named(name: str) -> Loss:
    """The loss of a name.

    Raises:
        ValueError: there is no such loss.
    """
    if name not in LOSSES:
        raise ValueError(f"loss_type must be one of {', '.join(LOSSES)}, got {name!r}")
    return LOSSES[name]


def terms_of(config: LossConfig) -> tuple[Term, ...]:
    """The losses of ``loss_type`` with their weights, and the NLL of ``sft_weight``."""
    return tuple(
        Term(name=name, weight=weight, loss=loss_named(name)) for name, weight in config.weighted
    )


def reaches_pool(config: LossConfig) -> bool:
    """Whether every candidate has a gradient, and not the drawn ones alone."""
    return config.augmented or any(term.loss.negatives == "pool" for term in terms_of(config))


def needs_reference(config: LossConfig) -> bool:
    """Whether the reference's log-probabilities change the loss."""
    return any(term.loss.reference for term in terms_of(config))
