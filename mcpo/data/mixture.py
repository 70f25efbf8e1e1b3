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
    schema: Schema | Literal["auto"] = "auto"
    """``auto`` looks at the columns of the first row."""
    split: str | None = None
    """Of a Hugging Face dataset; None is ``train``."""
    fraction: float = 1.0
    """Part of the rows to take, drawn by seed, before anything is dropped."""
    max_rows: int | None = None
    """Rows to take at most, drawn by seed, before anything is dropped."""

    def __post_init__(self) -> None:
        """Check the values."""
        if not 0 < self.fraction <= 1:
            raise ValueError(f"{self.path}: fraction must be in (0, 1], got {self.fraction}")
        if self.max_rows is not None and self.max_rows < 1:
            raise ValueError(f"{self.path}: max_rows must be at least 1, got {self.max_rows}")
        if self.schema != "auto" and self.schema not in get_args(Schema):
            raise ValueError(
                f"{self.path}: schema must be 'auto' or one of {', '.join(get_args(Schema))}, "
                f"got {self.schema!r}"
            )
        if self.split is not None and self.is_file:
            raise ValueError(
                f"{self.path}: split belongs to Hugging Face datasets and a file has none, "
                f"got {self.split!r}"
            )

    @property
    def is_file(self) -> bool:
        """Whether the path is read as a local file."""
        return self.path.endswith(FILE_ENDINGS) or Path(self.path).is_file()


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
