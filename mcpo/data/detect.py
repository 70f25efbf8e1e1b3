"""Which schema a row is in, from its columns."""

from __future__ import annotations

from typing import cast

from mcpo.data.mixture import Schema
from mcpo.data.raw import RawRow

_NEEDED: dict[Schema, tuple[str, ...]] = {
    "candidates": ("prompt", "completions"),
    "nectar": ("prompt", "answers"),
    "ultrafeedback": ("instruction", "completions"),
    "preference": ("chosen", "rejected"),
}


def detect_schema(raw: RawRow) -> Schema:
    """The one schema whose columns the row has.

    ``candidates`` whose prompt is messages and whose completions all have ranks are
    ``ranked_messages``.

    Raises:
        ValueError: no schema fits, or several do.
    """
    fitting: list[Schema] = [
        schema
        for schema, columns in _NEEDED.items()
        if all(column in raw.values for column in columns)
    ]
    if len(fitting) > 1:
        raise ValueError(
            f"{raw.where}: columns {', '.join(raw.values)} fit the schemas "
            f"{' and '.join(fitting)}; "
            "set schema to the one that is meant"
        )
    if not fitting:
        needs = "; ".join(
            f"{schema} needs {', '.join(columns)}" for schema, columns in _NEEDED.items()
        )
        raise ValueError(
            f"{raw.where}: columns {', '.join(raw.values)} fit no schema: {needs}; "
            "ranked_messages needs the columns of candidates with messages as prompt"
        )
    if fitting == ["candidates"] and _has_ranked_messages(raw):
        return "ranked_messages"
    return fitting[0]


def _has_ranked_messages(raw: RawRow) -> bool:
    completions = raw.values["completions"]
    if not isinstance(raw.values["prompt"], list) or not isinstance(completions, list):
        return False
    return all(
        isinstance(one, dict) and cast("dict[str, object]", one).get("rank") is not None
        for one in cast("list[object]", completions)
    )
