"""Rows of results: one line of JSON for each cell that was measured, with where it came from."""

from __future__ import annotations

import dataclasses
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.cells import Cell, Shape

RESULTS = Path(__file__).parent / "results"
FULL, QUICK = RESULTS / "head.jsonl", RESULTS / "quick.jsonl"
CUDA = RESULTS / "head_cuda.jsonl"


@dataclass(frozen=True, kw_only=True, slots=True)
class Provenance:
    """When, of what, by what command, and on what machine."""

    date: str
    commit: str
    dirty: bool
    command: str
    cpu: str
    flags: tuple[str, ...]
    cores: int
    threads: int
    wait_policy: str
    torch: str
    gpu: str = ""
    """Its name and driver; empty of rows of a CPU."""
    triton: str = ""

    @property
    def machine(self) -> tuple[object, ...]:
        """What rows of one table share."""
        return (
            self.cpu,
            self.flags,
            self.cores,
            self.threads,
            self.wait_policy,
            self.torch,
            self.gpu,
            self.triton,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A cell and what was measured of it; one entry of a list for each round."""

    cell: Cell
    title: str
    version: str
    ours: bool
    scalar: bool
    drawn: float
    """Share of the rows that the pattern ``mcpo`` trains."""
    seconds: tuple[float, ...]
    """CPU seconds by thread."""
    wall_seconds: tuple[float, ...]
    others: tuple[float, ...]
    """Cores that other processes kept busy."""
    gemm_seconds: dict[str, tuple[float, ...]]
    """Of the bare products right before the round, by name."""
    gemm_rows: dict[str, int]
    """How many rows each of them takes at a time."""
    memory_mib: float
    errors: dict[str, float | None]
    """Errors of values and gradients, and what the gate allows of each."""
    provenance: Provenance

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)

    @property
    def gradient_error(self) -> float | None:
        """The larger of the two."""
        found = [self.errors[name] for name in ("dhidden", "dweight")]
        return max((error for error in found if error is not None), default=None)

    def ratio(self, products: int) -> float:
        """Time over that of bare products, medians of both.

        Args:
            products: 1 is the forward's, 3 adds those of the two gradients, 4 the forward's once
                more, for an implementation that computes the logits again. For the pattern
                ``mcpo`` 2 stands for one over all rows and three over the trained ones.
        """
        taken = {name: statistics.median(each) for name, each in self.gemm_seconds.items()}
        bare = {
            1: lambda: taken["forward"],
            2: lambda: taken["forward"] + self.drawn * sum(taken.values()),
            3: lambda: sum(taken.values()),
            4: lambda: taken["forward"] + sum(taken.values()),
        }
        return self.median / bare[products]()


def append(row: Row, path: Path) -> None:
    """Write a row to the end of a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(dataclasses.asdict(row)) + "\n")


def read(path: Path) -> list[Row]:
    """All rows of a file, in order; none where there is no file."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [from_json(line) for line in lines]


def from_json(line: str) -> Row:
    """The inverse of what ``append`` writes."""
    fields: dict[str, Any] = json.loads(line)
    cell, provenance = fields.pop("cell"), fields.pop("provenance")
    for name in ("seconds", "wall_seconds", "others"):
        fields[name] = tuple(fields[name])
    products = fields.pop("gemm_seconds")
    provenance["flags"] = tuple(provenance["flags"])
    return Row(
        cell=Cell(shape=Shape(*cell.pop("shape")), **cell),
        provenance=Provenance(**provenance),
        gemm_seconds={name: tuple(taken) for name, taken in products.items()},
        **fields,
    )


def latest(rows: list[Row]) -> list[Row]:
    """The last row of each cell, of the machine that the last row of all is from."""
    if not rows:
        return []
    machine = rows[-1].provenance.machine
    return list({row.cell: row for row in rows if row.provenance.machine == machine}.values())
