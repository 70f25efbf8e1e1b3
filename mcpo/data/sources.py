"""Rows out of files and datasets, not yet understood."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from mcpo.data.mixture import FILE_ENDINGS, SourceSpec, subsample
from mcpo.data.raw import RawRow

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One row before it is decoded."""

    where: str
    default_id: str
    content: bytes | object
    """A line of JSON, or the row itself."""


def read_source(spec: SourceSpec, *, seed: int, index: int) -> Iterator[Record]:
    """The subsampled rows of a source, in their order.

    Raises:
        FileNotFoundError: there is no such file or dataset.
        ValueError: the file cannot be read as what its name says, or holds no rows.
    """
    rows = _read_file(spec.path) if spec.is_file else _load_dataset(spec)
    if not len(rows):
        raise ValueError(f"{spec.path} holds no rows; a source must have at least one")
    taken = subsample(len(rows), spec, seed, index)
    if isinstance(rows, list):
        yield from (rows[number] for number in taken)
        return
    # The splits of one dataset number their rows alike.
    name = f"{spec.path}:{spec.split or 'train'}"
    for number, row in zip(taken, rows.select(taken), strict=True):
        yield Record(
            where=f"{name} row {number + 1}", default_id=f"{name}:{number + 1}", content=row
        )


def decode(record: Record) -> RawRow:
    """The columns of a row and its id: the ``id`` column, or path and number.

    Raises:
        ValueError: the row is no JSON object, or its id is neither text that can be encoded nor a
            whole number.
    """
    content = record.content
    if isinstance(content, bytes):
        try:
            content = json.loads(content)
        # Nesting too deep for the parser is no ValueError.
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{record.where} is not valid JSON: {error}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{record.where} must hold one JSON object, got {type(content).__name__}")
    values = cast("Mapping[str, object]", content)
    row_id = values.get("id")
    if row_id is None:
        return RawRow(where=record.where, row_id=record.default_id, values=values)
    raw = RawRow(where=record.where, row_id=str(row_id), values=values)
    if isinstance(row_id, bool) or not isinstance(row_id, str | int):
        raise raw.wrong("id", "text or a whole number")
    if isinstance(row_id, str):
        raw.text("id")
    return raw


def _read_file(path: str) -> list[Record]:
    """All rows of a local file."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path} (looked from {Path.cwd()})")
    if path.endswith((".jsonl", ".jsonl.gz")):
        return _read_lines(path)
    if path.endswith(".json"):
        rows = _read_json(path)
    elif path.endswith(".parquet"):
        rows = _read_parquet(path)
    else:
        raise ValueError(f"{path} must end in {', '.join(FILE_ENDINGS)}; rename or convert it")
    return [
        Record(where=f"{path} row {number}", default_id=f"{path}:{number}", content=row)
        for number, row in enumerate(rows, start=1)
    ]


def _read_lines(path: str) -> list[Record]:
    """Lines that are not blank, decoded later: a broken one only matters when it is taken."""
    data = Path(path).read_bytes()
    if path.endswith(".gz"):
        try:
            data = gzip.decompress(data)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path} cannot be unpacked as gzip: {error}") from error
    return [
        Record(where=f"{path} line {number}", default_id=f"{path}:{number}", content=line)
        for number, line in enumerate(data.split(b"\n"), start=1)
        if line.strip()
    ]


def _read_json(path: str) -> Sequence[object]:
    try:
        rows = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is not valid JSON: {error}; a file with one object a line must end in .jsonl"
        ) from error
    if not isinstance(rows, list):
        raise ValueError(f"{path} must hold a list of rows, got {type(rows).__name__}")
    return cast("list[object]", rows)


def _read_parquet(path: str) -> Sequence[object]:
    from pyarrow import ArrowInvalid
    from pyarrow.parquet import read_table

    try:
        return cast("list[object]", read_table(path).to_pylist())
    except ArrowInvalid as error:
        raise ValueError(f"{path} cannot be read as parquet: {error}") from error


def _load_dataset(spec: SourceSpec) -> Dataset:
    """A Hugging Face dataset by name, or a local folder of one."""
    from datasets import load_dataset

    try:
        return load_dataset(spec.path, split=spec.split or "train")
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"source {spec.path!r} is no file ({', '.join(FILE_ENDINGS)}) and split "
            f"{spec.split or 'train'!r} of a Hugging Face dataset of that name cannot be loaded: "
            f"{error}"
        ) from error
