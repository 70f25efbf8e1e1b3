"""Rows of results: one line of JSON for each arm of a point, with where it came from."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.rows import RESULTS, Provenance
from benchmarks.step.points import Point

FULL, QUICK = RESULTS / "step.jsonl", RESULTS / "quick_step.jsonl"
CUDA = RESULTS / "step_cuda.jsonl"


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """An arm at a point and what was measured of it; one entry of a list for each round."""

    point: Point
    arm: str
    recompute: str
    seconds: tuple[float, ...]
    """CPU seconds by thread, of a GPU its own; none where memory alone was measured."""
    wall_seconds: tuple[float, ...]
    others: tuple[float, ...]
    """Cores that other processes kept busy."""
    peak_bytes: int | None
    """Beyond the weights; None where it was not measured."""
    flops: float
    tokens: int
    """Through the body in all forwards."""
    errors: dict[str, float]
    """Of loss and gradient, and what the gate allows of each; none where there are no seconds."""
    versions: str
    provenance: Provenance

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)


def append(rows: Iterable[Row], path: Path) -> None:
    """Write rows to the end of a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        for row in rows:
            file.write(json.dumps(dataclasses.asdict(row)) + "\n")


def read(path: Path) -> list[Row]:
    """All rows of a file, in order; none where there is no file."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [from_json(line) for line in lines]


def from_json(line: str) -> Row:
    """The inverse of what ``append`` writes."""
    fields: dict[str, Any] = json.loads(line)
    for name in ("seconds", "wall_seconds", "others"):
        fields[name] = tuple(fields[name])
    provenance = fields.pop("provenance")
    provenance["flags"] = tuple(provenance["flags"])
    return Row(point=Point(**fields.pop("point")), provenance=Provenance(**provenance), **fields)


def latest(rows: list[Row]) -> dict[Point, dict[str, Row]]:
    """Of each point the arms of the last session that timed it, of the machine of the last row.

    Arms are compared only with those they took turns with. A peak, which does not hang on what else
    ran, may be of another session.
    """
    rows = [row for row in rows if row.provenance.machine == rows[-1].provenance.machine]
    peaks = {_measured(row): row.peak_bytes for row in rows if row.peak_bytes is not None}
    found: dict[Point, dict[str, Row]] = {}
    for row in rows:
        if not row.seconds:
            continue
        arms = found.setdefault(row.point, {})
        if any(other.provenance.date != row.provenance.date for other in arms.values()):
            arms.clear()
        arms[row.arm] = dataclasses.replace(row, peak_bytes=peaks.get(_measured(row)))
    return found


def _measured(row: Row) -> tuple[Point, str, str]:
    return row.point, row.arm, row.recompute
