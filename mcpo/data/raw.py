"""A row as it was read, with typed access to its columns; errors name file, row and column."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

_LARGEST = sys.float_info.max


@dataclass(frozen=True, kw_only=True, slots=True)
class RawRow:
    """Columns of one row, or of one entry in a list of a row."""

    where: str
    """File and line, for messages."""
    row_id: str
    values: Mapping[str, object]

    def has(self, column: str) -> bool:
        """Whether the column is there and not null."""
        return self.values.get(column) is not None

    def value(self, column: str) -> object:
        """Whatever is in the column, null included.

        Raises:
            ValueError: there is no such column.
        """
        if column not in self.values:
            raise ValueError(
                f"{self.where} has no column {column!r}; its columns are {', '.join(self.values)}"
            )
        return self.values[column]

    def text(self, column: str) -> str:
        """A string.

        Raises:
            ValueError: it is missing, not a string, or no text that can be encoded.
        """
        value = self.value(column)
        if not isinstance(value, str):
            raise self.wrong(column, "text")
        if not is_unicode(value):
            raise self.wrong(column, "text without lone surrogates (half of a \\ud83d\\ude00 pair)")
        return value

    def number(self, column: str) -> float:
        """A finite number.

        Raises:
            ValueError: it is missing or not a finite number.
        """
        value = self.value(column)
        # A whole number in JSON may be larger than any float.
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not -_LARGEST <= value <= _LARGEST
        ):
            raise self.wrong(column, "a finite number")
        return float(value)

    def optional_text(self, column: str) -> str | None:
        """A string, or None where the column is missing or null."""
        return self.text(column) if self.has(column) else None

    def optional_number(self, column: str) -> float | None:
        """A finite number, or None where the column is missing or null."""
        return self.number(column) if self.has(column) else None

    def optional_flag(self, column: str, *, default: bool) -> bool:
        """True or false, or ``default`` where the column is missing or null.

        Raises:
            ValueError: it holds something else.
        """
        value = self.value(column) if self.has(column) else default
        if not isinstance(value, bool):
            raise self.wrong(column, "true or false")
        return value

    def entries(self, column: str) -> tuple[RawRow, ...]:
        """A list of objects, each with typed access of its own.

        Raises:
            ValueError: it is missing, no list, or holds something else.
        """
        value = self.value(column)
        if not isinstance(value, list | tuple):
            raise self.wrong(column, "a list of objects")
        return tuple(
            self._inside(f"{column}[{index}]", entry)
            for index, entry in enumerate(cast("list[object]", value))
        )

    def entry(self, column: str) -> RawRow:
        """One object with columns of its own.

        Raises:
            ValueError: it is missing or no object.
        """
        return self._inside(column, self.value(column))

    def wrong(self, column: str, wanted: str) -> ValueError:
        """The error for a column that is not what it must be."""
        shown = _shown(self.values.get(column))
        return ValueError(f"{self.where}: column {column!r} must be {wanted}, got {shown}")

    def _inside(self, column: str, value: object) -> RawRow:
        if not isinstance(value, Mapping):
            raise ValueError(
                f"{self.where}: column {column!r} must be an object, got {_shown(value)}"
            )
        return RawRow(
            where=f"{self.where}, {column}",
            row_id=self.row_id,
            values=cast("Mapping[str, object]", value),
        )


def is_unicode(text: str) -> bool:
    """Whether a text can be encoded: JSON may spell half of a surrogate pair, which cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _shown(value: object) -> str:
    """A value in a message, with its type and never in full."""
    if value is None:
        return "None"
    written = repr(value)
    return f"{type(value).__name__} {written if len(written) <= 60 else written[:57] + '...'}"
