"""From sampled completions to rows of the ``candidates`` schema.

The best completion that passes every check is the chosen one. The pool holds strictly worse ones:
completions that pass as much as the chosen one are left out, and so are texts that came twice and
empty ones. Equal scores have equal ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mcpo.data.instructions import passes
from mcpo.data.prompts import VerifiablePrompt

SOURCE = "verifiable"
MODEL = "SmolLM2-135M-Instruct"


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One sampled completion."""

    text: str
    temperature: float
    index: int
    """Which of the samples at this temperature."""
    finished: bool
    num_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Graded:
    """A sample and which checks of its prompt it passes."""

    sample: Sample
    passed: tuple[bool, ...]

    @property
    def score(self) -> float:
        """Share of checks passed."""
        return sum(self.passed) / len(self.passed)


def grade(prompt: VerifiablePrompt, samples: Sequence[Sample]) -> list[Graded]:
    """Check the samples; best first, among equals the cooler and then the earlier one."""
    graded = [
        Graded(
            sample=sample,
            passed=tuple(
                passes(check, sample.text, finished=sample.finished) for check in prompt.checks
            ),
        )
        for sample in samples
    ]
    return sorted(graded, key=lambda g: (-g.score, g.sample.temperature, g.sample.index))


def drop_reason(graded: Sequence[Graded]) -> str | None:
    """Why a prompt's completions make no preference row, or None if they make one."""
    if graded[0].score < 1:
        return "no completion passes"
    if graded[-1].score == 1:
        return "all completions pass"
    return None


def candidate_row(
    prompt: VerifiablePrompt, graded: Sequence[Graded], model: str = MODEL
) -> dict[str, Any] | None:
    """The preference row of a prompt, or None where the completions do not differ in the checks.

    All samples are in it, equal scores with equal ranks: the reader of the schema leaves out what
    ties with the chosen one and what is repeated.
    """
    if drop_reason(graded) is not None:
        return None
    scores = sorted({candidate.score for candidate in graded}, reverse=True)
    completions = [
        {
            "text": candidate.sample.text,
            "score": candidate.score,
            "rank": scores.index(candidate.score) + 1,
            "model": model,
            "temperature": candidate.sample.temperature,
            "finished": candidate.sample.finished,
        }
        for candidate in graded
    ]
    return {
        "id": prompt.prompt_id,
        "prompt": prompt.text,
        "source": SOURCE,
        "completions": completions,
        "checks": check_records(prompt),
    }


def prompt_record(prompt: VerifiablePrompt) -> dict[str, Any]:
    """A prompt to be decoded and checked, whether or not its samples make a preference row."""
    return {
        "id": prompt.prompt_id,
        "prompt": prompt.text,
        "topic": prompt.topic,
        "checks": check_records(prompt),
        "unseen_kind": prompt.unseen_kind,
    }


def check_records(prompt: VerifiablePrompt) -> list[dict[str, Any]]:
    """The checks of a prompt, ready for JSON."""
    return [{"kind": check.kind, "args": dict(check.args)} for check in prompt.checks]
