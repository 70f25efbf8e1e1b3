"""Prompts whose answers a program checks: load them, score answers, compare two runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mcpo.data.instructions import KINDS, Check, passes
from mcpo.evaluate.statistics import PairedResult, compare_paired

if TYPE_CHECKING:
    from mcpo.evaluate.generate import Completion

_FIELDS = ("id", "prompt", "topic", "checks", "unseen_kind")


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifiableItem:
    """One prompt to decode and the checks its answer must pass."""

    item_id: str
    prompt: str
    topic: str
    """Items of one topic count as one cluster in the statistics."""
    checks: tuple[Check, ...]
    unseen_kind: bool
    """Whether a check is of a kind that no training prompt asks for."""


def load_items(path: Path) -> list[VerifiableItem]:
    """Read a ``verifiable_*_prompts.jsonl`` file.

    Raises:
        ValueError: the file is empty, or a line lacks a field or names an unknown kind.
    """
    lines = path.read_text(encoding="utf-8").split("\n")
    items = [
        _item(line, where=f"{path}:{number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not items:
        raise ValueError(f"{path} must hold at least one prompt; it is empty; make it again")
    return items


def score(
    items: Sequence[VerifiableItem], completions: Sequence[Completion]
) -> list[tuple[bool, ...]]:
    """For each item, which of its checks its completion passes."""
    if len(items) != len(completions):
        raise ValueError(
            f"every item needs one completion; got {len(items)} items and {len(completions)} "
            "completions; pass them in the same order"
        )
    return [
        tuple(passes(check, answer.text, finished=answer.finished) for check in item.checks)
        for item, answer in zip(items, completions, strict=True)
    ]


def compare(
    items: Sequence[VerifiableItem],
    before: Sequence[Sequence[bool]],
    after: Sequence[Sequence[bool]],
) -> dict[str, PairedResult]:
    """Compare two runs over the same items.

    Args:
        items: the prompts, in the order of the scores.
        before: what ``score`` gave before training.
        after: the same after training.

    Returns:
        ``"all"``, then ``"seen kinds"`` and ``"unseen kinds"``, then every kind by name; a part
        with no check is left out.
    """
    if not len(items) == len(before) == len(after):
        raise ValueError(
            "items, before and after must have the same length; got "
            f"{len(items)}, {len(before)} and {len(after)}"
        )
    parts: dict[str, list[tuple[bool, bool, str]]] = {
        "all": [],
        "seen kinds": [],
        "unseen kinds": [],
    }
    parts |= {kind: [] for kind in KINDS}
    for item, early, late in zip(items, before, after, strict=True):
        for check, was, now in zip(item.checks, early, late, strict=True):
            outcome = (was, now, item.topic)
            for part in ("all", "unseen kinds" if item.unseen_kind else "seen kinds", check.kind):
                parts[part].append(outcome)
    return {part: compare_paired(*zip(*rows, strict=True)) for part, rows in parts.items() if rows}


def markdown_table(results: Mapping[str, PairedResult]) -> str:
    """The comparison as a table: rates with standard errors in percent, and p-values."""
    lines = ["| checks | n | before | after | change | p |", "|---|---|---|---|---|---|"]
    for part, result in results.items():
        rates = [
            f"{100 * rate.mean:.1f} ± {100 * rate.stderr:.1f}"
            for rate in (result.before, result.after)
        ]
        change = f"{100 * result.difference.mean:+.1f} ± {100 * result.difference.stderr:.1f}"
        cells = [part, str(result.num_checks), *rates, change, f"{result.p_value:.2g}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _item(line: str, *, where: str) -> VerifiableItem:
    try:
        record: dict[str, Any] = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} must be a JSON object; got {line[:60]!r} ({error})") from error
    missing = [name for name in _FIELDS if name not in record]
    if missing:
        raise ValueError(f"{where} must have the fields {list(_FIELDS)}; it lacks {missing}")
    checks = tuple(Check(kind=check["kind"], args=check["args"]) for check in record["checks"])
    unknown = [check.kind for check in checks if check.kind not in KINDS]
    if unknown or not checks:
        raise ValueError(
            f"{where}: checks must name at least one kind, all of {sorted(KINDS)}; "
            f"got {unknown or 'none'}; make the file again with this version"
        )
    return VerifiableItem(
        item_id=record["id"],
        prompt=record["prompt"],
        topic=record["topic"],
        checks=checks,
        unseen_kind=record["unseen_kind"],
    )
