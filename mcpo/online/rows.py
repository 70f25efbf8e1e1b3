"""From answers and a judge to rows of the ``candidates`` schema, which any run can read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mcpo.judges.scoring import ScoringJudge
from mcpo.judges.tournament import Group, tournament
from mcpo.judges.verdict import PairwiseJudge
from mcpo.online.plan import Prompt
from mcpo.records import Candidate


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """The rows of a segment, and what became of the other prompts."""

    rows: tuple[dict[str, Any], ...]
    too_few: int
    """Prompts with fewer than two different answers that are not empty."""
    undecided: int
    """Prompts where the judge told no answer from another."""


def by_scores(
    prompts: Sequence[Prompt],
    groups: Sequence[Sequence[Candidate]],
    judge: ScoringJudge,
    on_prompt: Callable[[int], None] = lambda _: None,
) -> Judged:
    """Rows ranked by a number for each answer; where all are equal there is none."""
    asked, too_few = _comparable(prompts, groups)
    rows: list[dict[str, Any]] = []
    for prompt, group in asked:
        (scores,) = judge.score([group])
        on_prompt(1)
        if len(set(scores)) > 1:
            order = sorted(set(scores), reverse=True)
            ranks = [order.index(score) + 1 for score in scores]
            rows.append(_row(prompt, group, ranks, scores))
    return Judged(rows=tuple(rows), too_few=too_few, undecided=len(asked) - len(rows))


def by_tournament(
    prompts: Sequence[Prompt],
    groups: Sequence[Sequence[Candidate]],
    judge: PairwiseJudge,
    on_verdict: Callable[[int], None] = lambda _: None,
) -> Judged:
    """Rows with the winner of N - 1 comparisons first and the others second.

    Answers that met the winner and were not beaten are its equals, which the reader of the schema
    leaves out of the pool.
    """
    asked, too_few = _comparable(prompts, groups)
    outcomes = tournament([group for _, group in asked], judge, on_verdict)
    rows: list[dict[str, Any]] = []
    for (prompt, group), outcome in zip(asked, outcomes, strict=True):
        best = {outcome.winner, *outcome.rivals}
        if outcome.winner is not None and len(best) < len(group.answers):
            ranks = [1 if number in best else 2 for number in range(len(group.answers))]
            rows.append(_row(prompt, group, ranks, None, first=outcome.winner))
    return Judged(rows=tuple(rows), too_few=too_few, undecided=len(asked) - len(rows))


def text_of(prompt: Prompt) -> str:
    """What a judge reads: the prompt, or the conversation with its roles."""
    if isinstance(prompt.prompt, str):
        return prompt.prompt
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt.prompt)


def _comparable(
    prompts: Sequence[Prompt], groups: Sequence[Sequence[Candidate]]
) -> tuple[list[tuple[Prompt, Group]], int]:
    """Prompts with their different answers, of two or more."""
    found: list[tuple[Prompt, Group]] = []
    for prompt, candidates in zip(prompts, groups, strict=True):
        different = {one.text: one for one in reversed(candidates) if one.text}
        answers = tuple(one for one in candidates if different.get(one.text) is one)
        if len(answers) >= 2:
            found.append((prompt, Group(prompt=text_of(prompt), answers=answers)))
    return found, len(prompts) - len(found)


def _row(
    prompt: Prompt,
    group: Group,
    ranks: Sequence[int],
    scores: Sequence[float] | None,
    *,
    first: int | None = None,
) -> dict[str, Any]:
    """A row, best first; among equals ``first``, then the order of the answers."""
    completions = [
        {
            "text": answer.text,
            "rank": rank,
            "finished": answer.finished,
            **({} if scores is None else {"score": scores[number]}),
            **({} if answer.model is None else {"model": answer.model}),
        }
        for number, (answer, rank) in enumerate(zip(group.answers, ranks, strict=True))
    ]
    order = sorted(range(len(completions)), key=lambda number: (ranks[number], number != first))
    asked: Any = prompt.prompt
    return {
        "id": prompt.row_id,
        "prompt": asked if isinstance(asked, str) else list(asked),
        "completions": [completions[number] for number in order],
    }
