"""The paper's way to a winner: a tournament in one line, N - 1 comparisons for N answers.

The first two answers are compared, the winner against the third, and so on (arXiv 2502.04567,
section 5.3). It takes for granted that the judge is transitive and does not mind the order; the
judge's own two orders see to the second.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mcpo.judges.verdict import Comparison, PairwiseJudge, Verdict

if TYPE_CHECKING:
    from mcpo.records import Candidate


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """The answers to one prompt."""

    prompt: str
    answers: tuple[Candidate, ...]
    """At least two."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """Who won, and how."""

    winner: int | None
    """Index of the best answer; None if no comparison was decided."""
    rivals: tuple[int, ...]
    """Answers that met the winner and were not beaten: no pool may hold them."""
    verdicts: tuple[Verdict, ...]
    """N - 1, in the order of the comparisons; FIRST is the one who had won so far."""


def tournament(
    groups: Sequence[Group],
    judge: PairwiseJudge,
    on_verdict: Callable[[int], None] = lambda _: None,
) -> list[Outcome]:
    """The best answer of every group.

    The same round of all groups is one call of the judge, which can ask many at a time. After a tie
    or an abstention the one who had won so far stays. Where nothing was decided there is no winner:
    such a group has nothing to teach.

    Raises:
        ValueError: a group has fewer than two answers.
        JudgeError: of the judge.
    """
    for number, group in enumerate(groups):
        if len(group.answers) < 2:
            raise ValueError(
                f"a tournament needs at least 2 answers, got {len(group.answers)} in group {number}"
            )
    best = [0] * len(groups)
    verdicts: list[list[Verdict]] = [[] for _ in groups]
    for challenger in range(1, max((len(group.answers) for group in groups), default=0)):
        playing = [i for i, group in enumerate(groups) if challenger < len(group.answers)]
        pairs = [
            Comparison(
                prompt=groups[i].prompt,
                first=groups[i].answers[best[i]].text,
                second=groups[i].answers[challenger].text,
            )
            for i in playing
        ]
        for i, verdict in zip(playing, judge.compare(pairs, on_verdict), strict=True):
            verdicts[i].append(verdict)
            if verdict is Verdict.SECOND:
                best[i] = challenger
    return [_outcome(winner, said) for winner, said in zip(best, verdicts, strict=True)]


def _outcome(winner: int, verdicts: Sequence[Verdict]) -> Outcome:
    # The comparison before the n-th answer is number n - 1; those after the winner's own are its.
    rivals = tuple(
        challenger
        for challenger, verdict in enumerate(verdicts, start=1)
        if challenger > winner and verdict in (Verdict.TIE, Verdict.ABSTAIN)
    )
    decided = Verdict.FIRST in verdicts or Verdict.SECOND in verdicts
    return Outcome(winner=winner if decided else None, rivals=rivals, verdicts=tuple(verdicts))


def num_comparisons(groups: Sequence[Group]) -> int:
    """How many there will be: N - 1 for each group."""
    return sum(len(group.answers) - 1 for group in groups)
