"""Rows of the sweep, a line of JSON for each model type, and the page made of them."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

from benchmarks.models.compare import Verdict

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "models.jsonl"
PAGE = ROOT / "docs" / "models.md"
TEMPLATE = Path(__file__).with_name("page.md")
# Longer reasons are cut in the table; the row has the whole.
MOST_LETTERS = 180


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A verdict and where it comes from."""

    verdict: Verdict
    date: str
    commit: str
    dirty: bool
    transformers: str
    torch: str


def write(rows: Sequence[Row], path: Path) -> None:
    """One line each, in the order of the names."""
    ordered = sorted(rows, key=lambda row: row.verdict.model_type)
    path.write_text("".join(json.dumps(dataclasses.asdict(row)) + "\n" for row in ordered))


def read(path: Path) -> list[Row]:
    """All rows of a file; none where there is no file."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [_from_json(line) for line in lines]


def page(rows: Sequence[Row]) -> str:
    """The whole document."""
    verdicts = [row.verdict for row in rows]
    count = Counter(verdict.outcome for verdict in verdicts)
    served = [verdict for verdict in verdicts if verdict.outcome == "served"]
    return Template(TEMPLATE.read_text()).substitute(
        provenance=_provenance(rows),
        total=len(rows),
        num_served=count["served"],
        num_plain=count["plain"],
        num_refused=count["refused"],
        num_not_built=count["not built"],
        float32=f"{max(verdict.float32_error or 0.0 for verdict in served):.2f}",
        float64=f"{max(verdict.float64_error or 0.0 for verdict in served):.0e}",
        gradient=f"{max(verdict.gradient_error or 0.0 for verdict in served):.0e}",
        served="\n".join(_served(verdict) for verdict in served),
        plain=_reasons(verdicts, "plain"),
        refused=_reasons(verdicts, "refused"),
        not_built=_reasons(verdicts, "not built"),
    )


def _served(verdict: Verdict) -> str:
    kinds = ", ".join(kind.removesuffix("_attention") for kind in verdict.layer_types) or "full"
    errors = [verdict.float64_error, verdict.gradient_error]
    shown = ["-" if error is None else f"{error:.0e}" for error in errors]
    return (
        f"| {verdict.model_type} | {verdict.model_class} | {kinds} | {verdict.float32_error:.3f} | "
        f"{' | '.join(shown)} |"
    )


def _reasons(verdicts: Sequence[Verdict], outcome: str) -> str:
    return "\n".join(
        f"| {verdict.model_type} | {verdict.stage or '-'} | {_cut(verdict)} |"
        for verdict in verdicts
        if verdict.outcome == outcome
    )


def _cut(verdict: Verdict) -> str:
    reason = verdict.reason.removeprefix(f"{verdict.model_class} cannot be packed: ")
    # Of the self-check's message what there is to know: the numbers stand in the row.
    if " more than a projection" in reason:
        reason = reason[reason.rindex("Its ") :].removesuffix(": use another model")
    reason = reason.encode("ascii", "replace").decode().replace("|", "/")
    return reason if len(reason) <= MOST_LETTERS else f"{reason[:MOST_LETTERS]} ..."


def _provenance(rows: Sequence[Row]) -> str:
    commits = dict.fromkeys(f"{row.commit}{' with changes' if row.dirty else ''}" for row in rows)
    dates = sorted(row.date for row in rows)
    versions = dict.fromkeys(f"transformers {row.transformers}, torch {row.torch}" for row in rows)
    return f"{'; '.join(versions)}; commit {', '.join(commits)}; {dates[0]} to {dates[-1]}"


def _from_json(line: str) -> Row:
    fields: dict[str, Any] = json.loads(line)
    verdict = fields.pop("verdict")
    verdict["layer_types"] = tuple(verdict["layer_types"])
    return Row(verdict=Verdict(**verdict), **fields)
