"""The steps side by side, under the names of ``--arms``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.step.packed import PackedStep
from benchmarks.step.padded import PaddedStep
from benchmarks.step.problem import Problem
from benchmarks.step.trl import TrlStep

Step = Callable[[], Tensor]
"""A forward and a backward; gives the loss and leaves gradients in its model."""


class Built(NamedTuple):
    """An arm that is ready to run."""

    step: Step
    recompute: str
    """What its backward computes again: a mode of ``mcpo.recompute``."""


Build = Callable[[Problem, PreTrainedModel, PreTrainedTokenizerBase], Built]


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """One way to make a step."""

    name: str
    title: str
    build: Build
    """Takes a model of its own, which it changes."""
    kind: str
    """What is computed: ``packed``, ``lazy``, ``padded``, ``naive``, ``trl`` or ``trl_stored``."""
    pairs: bool = True
    """Given the drawn pairs; if not, the whole pool."""

    @property
    def is_trl(self) -> bool:
        """It is a step of TRL."""
        return self.kind in ("trl", "trl_stored")


def _packed(mode: str, *, lazy: bool = False) -> Build:
    def build(problem: Problem, model: PreTrainedModel, _: PreTrainedTokenizerBase) -> Built:
        step = PackedStep(problem, model, mode, lazy=lazy)
        return Built(step, step.mode)

    return build


def _padded(*, checkpointed: bool, naive: bool = False) -> Build:
    def build(problem: Problem, model: PreTrainedModel, _: PreTrainedTokenizerBase) -> Built:
        step = PaddedStep(problem, model, checkpointed=checkpointed, naive=naive)
        return Built(step, "full" if checkpointed else "none")

    return build


def _trl(*, fused: bool, checkpointed: bool) -> Build:
    def build(
        problem: Problem, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> Built:
        step = TrlStep(problem, model, tokenizer, fused=fused, checkpointed=checkpointed)
        return Built(step, "full" if checkpointed else "none")

    return build


ARMS = (
    Arm(name="mcpo", title="MC-PO", build=_packed("auto"), kind="packed", pairs=False),
    Arm(
        name="mcpo_selective",
        title="MC-PO, selective recompute",
        build=_packed("selective"),
        kind="packed",
        pairs=False,
    ),
    Arm(
        name="mcpo_lazy",
        title="MC-PO, lazy",
        build=_packed("auto", lazy=True),
        kind="lazy",
        pairs=False,
    ),
    Arm(name="dpo", title="DPO, shared prefix", build=_packed("auto"), kind="packed"),
    Arm(name="dpo_padded", title="DPO, padded", build=_padded(checkpointed=False), kind="padded"),
    Arm(
        name="dpo_padded_checkpointed",
        title="DPO, padded, checkpointed",
        build=_padded(checkpointed=True),
        kind="padded",
    ),
    Arm(
        name="mcpo_naive",
        title="MC-PO, naive",
        build=_padded(checkpointed=False, naive=True),
        kind="naive",
        pairs=False,
    ),
    Arm(
        name="trl_default",
        title="TRL DPO, its defaults",
        build=_trl(fused=True, checkpointed=True),
        kind="trl",
    ),
    Arm(
        name="trl_fused",
        title="TRL DPO, not checkpointed",
        build=_trl(fused=True, checkpointed=False),
        kind="trl",
    ),
    Arm(
        name="trl_eager_checkpointed",
        title="TRL DPO, stored logits, checkpointed",
        build=_trl(fused=False, checkpointed=True),
        kind="trl_stored",
    ),
    Arm(
        name="trl_eager",
        title="TRL DPO, stored logits, not checkpointed",
        build=_trl(fused=False, checkpointed=False),
        kind="trl_stored",
    ),
)
"""In the order of the tables."""
NAMES = tuple(arm.name for arm in ARMS)
LAZY_NAMES = ("mcpo_lazy", "dpo", "dpo_padded", "dpo_padded_checkpointed")
"""What ``--scoring lazy`` measures: the lazy step beside steps on a pair."""
TRL_BEST = "trl_best"
"""The fastest of the arms of TRL, whichever it is; no arm of its own."""


def named(name: str) -> Arm:
    """The arm of a name."""
    return next(arm for arm in ARMS if arm.name == name)


def trl_names() -> tuple[str, ...]:
    """Among which the best is sought."""
    return tuple(arm.name for arm in ARMS if arm.is_trl)
