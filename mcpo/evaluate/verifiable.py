"""Prompts whose answers a program checks: load them, score answers, compare two runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from mcpo.data.instructions import KINDS, Arg, Check, passes, require_args
from mcpo.data.raw import RawRow
from mcpo.data.sources import Record, decode
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
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, or a line is no JSON object, lacks a field, or asks for an
            unknown kind or for one with other arguments.
    """
    if not path.is_file():
        found = "a folder" if path.is_dir() else "not there"
        raise FileNotFoundError(
            f"prompts with checks must be in a JSONL file, got {path}, which is {found}; "
            "name one file with heldout_prompts"
        )
    items = [
        _item(Record(where=f"{path}:{number}", default_id=f"{path}:{number}", content=line))
        for number, line in enumerate(path.read_bytes().split(b"\n"), start=1)
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


def _item(record: Record) -> VerifiableItem:
    raw = decode(record)
    missing = [name for name in _FIELDS if name not in raw.values]
    if missing:
        raise ValueError(f"{raw.where} must have the fields {list(_FIELDS)}; it lacks {missing}")
    return VerifiableItem(
        item_id=raw.row_id,
        prompt=raw.text("prompt"),
        topic=raw.text("topic"),
        checks=read_checks(raw),
        unseen_kind=raw.optional_flag("unseen_kind", default=False),
    )


def read_checks(raw: RawRow) -> tuple[Check, ...]:
    """What an answer must pass.

    Raises:
        ValueError: there are none, or one is of an unknown kind or has other arguments.
    """
    checks = tuple(_check(entry) for entry in raw.entries("checks"))
    if not checks:
        raise ValueError(f"{raw.where}: checks must hold at least one, got none")
    return checks


def _check(entry: RawRow) -> Check:
    kind = entry.text("kind")
    if kind not in KINDS:
        raise ValueError(f"{entry.where}: kind must be one of {sorted(KINDS)}, got {kind!r}")
    check = Check(kind=kind, args=cast("Mapping[str, Arg]", entry.entry("args").values))
    try:
        require_args(check)
    except ValueError as error:
        raise ValueError(f"{entry.where}: {error}") from error
    return check
