"""A comparison of two answers and what may come of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol


class Verdict(Enum):
    """What a judge says of two answers."""

    FIRST = "first"
    SECOND = "second"
    TIE = "tie"
    ABSTAIN = "abstain"
    """The judge answered, and its answer is no verdict."""

    @property
    def swapped(self) -> Verdict:
        """The same verdict where the answers change places."""
        return _SWAPPED.get(self, self)


_SWAPPED = {Verdict.FIRST: Verdict.SECOND, Verdict.SECOND: Verdict.FIRST}


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Two answers to one prompt."""

    prompt: str
    first: str
    second: str


class PairwiseJudge(Protocol):
    """Anything that compares answers by twos."""

    def compare(
        self, comparisons: Sequence[Comparison], on_verdict: Callable[[int], None] = ...
    ) -> list[Verdict]:
        """One verdict each, in order; ``on_verdict`` hears of every one with the number 1.

        Raises:
            JudgeError: some comparison has no answer; a failure is never a verdict.
        """
        ...


class JudgeError(RuntimeError):
    """The judge could not be asked; what it has said so far is kept where it has a cache."""


def combine_orders(forward: Verdict, backward: Verdict) -> Verdict:
    """One verdict of two, the second given with the answers swapped.

    A judge that names the same answer both times is believed. One that contradicts itself, or
    decides in one order alone, sees no difference worth a label: a tie. Half a verdict is none.
    """
    again = backward.swapped
    if Verdict.ABSTAIN in (forward, again):
        return Verdict.ABSTAIN
    return forward if forward == again else Verdict.TIE
