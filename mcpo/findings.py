"""What was dropped or changed on the way from rows to tokens, by kind: counted, never silent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_NUM_EXAMPLES = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """How often one thing happened and the first rows it happened to."""

    kind: str
    count: int
    examples: tuple[str, ...]
    """Row ids, at most three."""


class Tally:
    """Findings while they are being counted."""

    def __init__(self) -> None:
        """Nothing found yet."""
        self._counts: dict[str, int] = {}
        self._examples: dict[str, list[str]] = {}

    def add(self, kind: str, row_id: str) -> None:
        """Count one more of ``kind``."""
        self._counts[kind] = self._counts.get(kind, 0) + 1
        examples = self._examples.setdefault(kind, [])
        if len(examples) < _NUM_EXAMPLES and row_id not in examples:
            examples.append(row_id)

    def findings(self) -> tuple[Finding, ...]:
        """What was found, by name of kind."""
        return tuple(
            Finding(kind=kind, count=count, examples=tuple(self._examples[kind]))
            for kind, count in sorted(self._counts.items())
        )


def counts(findings: Sequence[Finding]) -> dict[str, int]:
    """Counts by kind."""
    return {finding.kind: finding.count for finding in findings}


def describe(findings: Sequence[Finding]) -> str:
    """One sentence for messages: ``too_long 3 (row a, b, c), ...``."""
    if not findings:
        return "nothing was dropped or changed"
    return ", ".join(
        f"{finding.kind} {finding.count} (row {', '.join(finding.examples)})"
        for finding in findings
    )
