"""What to read and how much of it: sources and their deterministic subsamples."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np

Schema = Literal["candidates", "nectar", "ultrafeedback", "preference", "ranked_messages"]

FILE_ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".parquet")


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceSpec:
    """One file or dataset of a mixture; a mixture holds its sources one after the other."""

    path: str
    """A .jsonl, .jsonl.gz, .json or .parquet file, or the name of a Hugging Face dataset."""
    schema: Literal["auto", Schema] = "auto"
    """``auto`` looks at the columns of the first row."""
    split: str | None = None
    """Of a Hugging Face dataset; None is ``train``."""
    fraction: float = 1.0
    """Part of the rows to take, drawn by seed, before anything is dropped."""
    max_rows: int | None = None
    """Rows to take at most, drawn by seed, before anything is dropped."""

    def __post_init__(self) -> None:
        """Check types, which a YAML file leaves open, and values."""
        where = f"{self.path}: "
        path = self.path if _is(self.path, str) else ""
        _require(path != "", "path of a source must name a file or dataset", self.path)
        holds = _is(self.split, str, type(None)) and self.split != ""
        _require(holds, f"{where}split must be the name of one", self.split)
        holds = _is(self.fraction, int, float) and 0 < self.fraction <= 1
        _require(holds, f"{where}fraction must be in (0, 1]", self.fraction)
        holds = self.max_rows is None or (_is(self.max_rows, int) and self.max_rows >= 1)
        _require(holds, f"{where}max_rows must be a whole number of at least 1", self.max_rows)
        schemas = get_args(Schema)
        rule = f"{where}schema must be 'auto' or one of {', '.join(schemas)}"
        _require(self.schema in ("auto", *schemas), rule, self.schema)
        rule = f"{where}split belongs to Hugging Face datasets and a file has none"
        _require(self.split is None or not self.is_file, rule, self.split)

    @property
    def is_file(self) -> bool:
        """Whether the path is read as a local file."""
        return self.path.endswith(FILE_ENDINGS) or Path(self.path).is_file()


def _is(value: object, *kinds: type) -> bool:
    """Whether a value is of one of the types; true and false are no numbers."""
    return isinstance(value, kinds) and not isinstance(value, bool)


def _require(holds: bool, rule: str, got: object) -> None:
    if not holds:
        raise ValueError(f"{rule}, got {got!r}")


def parse_source(text: str) -> SourceSpec:
    """A source from one string: a file, or ``dataset`` or ``dataset:split``."""
    name, colon, split = text.rpartition(":")
    if not colon or SourceSpec(path=text).is_file:
        return SourceSpec(path=text)
    return SourceSpec(path=name, split=split)


def subsample(num_rows: int, spec: SourceSpec, seed: int, index: int) -> list[int]:
    """Which rows of the source at ``index`` of the mixture are taken, in their order.

    At least one row is taken of a source that has any, however small the fraction.
    """
    wanted = max(1, round(num_rows * spec.fraction))
    wanted = min(num_rows, wanted, spec.max_rows or num_rows)
    if wanted == num_rows:
        return list(range(num_rows))
    # The raw stream is the same in every numpy version, unlike Generator.choice.
    keys = np.random.Philox(np.random.SeedSequence((seed, index))).random_raw(num_rows)
    return sorted(np.argsort(keys, kind="stable")[:wanted].tolist())
