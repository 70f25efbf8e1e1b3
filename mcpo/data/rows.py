"""Stage 1: sources in any supported schema become rows of one prompt, one chosen, and a pool.

Kinds of findings. Candidates dropped: ``repeated_completion``, ``second_best`` (Nectar's rank 2),
``tied_with_chosen``, ``unrated_completion``, and those of ``pools.py``. Rows dropped:
``empty_pool``, ``tied_row``, ``bad_row``. Rows renamed: ``duplicate_id``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from mcpo.data.candidates import read_candidates
from mcpo.data.detect import detect_schema
from mcpo.data.mixture import Schema, SourceSpec, parse_source
from mcpo.data.nectar import read_nectar
from mcpo.data.pools import shrink_pool
from mcpo.data.preference import read_preference
from mcpo.data.ranked_messages import read_ranked_messages
from mcpo.data.ranking import Ties
from mcpo.data.raw import RawRow
from mcpo.data.sources import decode, read_source
from mcpo.data.ultrafeedback import ScoreField, read_ultrafeedback
from mcpo.findings import Finding, Tally, describe
from mcpo.records import CandidateRow


@dataclass(frozen=True, kw_only=True, slots=True)
class RowOptions:
    """How rows are understood."""

    nectar_drop_second: bool = True
    """Leave out Nectar's rank 2, as the MC-PO paper does."""
    score_field: ScoreField = "fine-grained_score"
    """UltraFeedback's column; ``aspect_mean`` is the mean rating in ``annotations``. The default is
    that mean as published: some of the worst answers carry an ``overall_score`` of 10."""
    ties: Ties = "drop_rivals"
    """What is done where several are best: ``drop_rivals`` drops the others that are as good as the
    chosen one, ``drop_row`` the row, ``keep`` nothing."""
    bad_rows: Literal["error", "drop"] = "error"
    """Whether a row that cannot be read stops the run or is counted as ``bad_row``."""
    drop_top_k: int = 0
    """How many of the best of each pool are left out."""
    max_pool_size: int | None = None
    """How many of each pool are kept at most, drawn by seed and row id; None for all."""

    def __post_init__(self) -> None:
        """Check the values."""
        for name, choices in (
            ("score_field", get_args(ScoreField)),
            ("ties", get_args(Ties)),
            ("bad_rows", ("error", "drop")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        if self.drop_top_k < 0:
            raise ValueError(f"drop_top_k must be 0 or more, got {self.drop_top_k}")
        if self.max_pool_size is not None and self.max_pool_size < 1:
            raise ValueError(f"max_pool_size must be at least 1, got {self.max_pool_size}")


@dataclass(frozen=True, kw_only=True, slots=True)
class RowsReport:
    """The rows, source after source, and what was dropped or changed to get them."""

    rows: tuple[CandidateRow, ...]
    findings: tuple[Finding, ...]


def load_rows(
    sources: Sequence[SourceSpec | str], *, options: RowOptions | None = None, seed: int = 0
) -> RowsReport:
    """Read sources, each a ``SourceSpec`` or its path as a string.

    Args:
        sources: read one after the other; the order of training mixes them.
        options: how rows are understood.
        seed: of the subsamples, and of which candidates are kept.

    Raises:
        FileNotFoundError: a source does not exist.
        ValueError: a source or a row cannot be read, no schema fits, a pool that is to lose its
            best is not ranked, or no row is left.
    """
    options = options or RowOptions()
    specs = [parse_source(one) if isinstance(one, str) else one for one in sources]
    tally = Tally()
    rows: list[CandidateRow] = []
    taken_ids: set[str] = set()
    for index, spec in enumerate(specs):
        for row in _read(spec, options, tally, seed=seed, index=index):
            shrunk = shrink_pool(
                _with_own_id(row, taken_ids, tally),
                drop_top_k=options.drop_top_k,
                max_pool_size=options.max_pool_size,
                seed=seed,
                tally=tally,
            )
            if shrunk is not None:
                rows.append(shrunk)
    findings = tally.findings()
    if not rows:
        raise ValueError(
            f"no row is left of {', '.join(spec.path for spec in specs) or 'no sources'}: "
            f"{describe(findings)}; at least one row must be usable"
        )
    return RowsReport(rows=tuple(rows), findings=findings)


def _read(
    spec: SourceSpec, options: RowOptions, tally: Tally, *, seed: int, index: int
) -> Iterator[CandidateRow]:
    """The usable rows of one source."""
    schema: Schema | None = None if spec.schema == "auto" else spec.schema
    for record in read_source(spec, seed=seed, index=index):
        try:
            raw = decode(record)
        except ValueError as error:
            _refuse(error, options, tally)
            continue
        # Outside the try: columns that no schema fits are no matter of one bad row.
        schema = schema or detect_schema(raw)
        try:
            row = _understand(raw, schema, options, tally)
        except ValueError as error:
            _refuse(error, options, tally)
            continue
        if row is not None:
            yield row


def _understand(
    raw: RawRow, schema: Schema, options: RowOptions, tally: Tally
) -> CandidateRow | None:
    ties = options.ties
    match schema:
        case "candidates":
            return read_candidates(raw, ties=ties, tally=tally)
        case "ranked_messages":
            return read_ranked_messages(raw, ties=ties, tally=tally)
        case "nectar":
            second = options.nectar_drop_second
            return read_nectar(raw, drop_second=second, ties=ties, tally=tally)
        case "ultrafeedback":
            field = options.score_field
            return read_ultrafeedback(raw, score_field=field, ties=ties, tally=tally)
        case "preference":
            return read_preference(raw, tally=tally)


def _refuse(error: ValueError, options: RowOptions, tally: Tally) -> None:
    """Stop at a row that cannot be read, or count it with what is wrong with it."""
    if options.bad_rows == "error":
        raise ValueError(f"{error} (bad_rows='drop' leaves such rows out)") from error
    tally.add("bad_row", str(error))


def _with_own_id(row: CandidateRow, taken: set[str], tally: Tally) -> CandidateRow:
    """The row under an id that no other has: the second ``a`` becomes ``a#2``."""
    row_id, count = row.row_id, 1
    while row_id in taken:
        count += 1
        row_id = f"{row.row_id}#{count}"
    taken.add(row_id)
    if row_id == row.row_id:
        return row
    tally.add("duplicate_id", row.row_id)
    return replace(row, row_id=row_id)
