"""Answers of a judge, kept on disk, so that no question is paid for twice."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Generator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What a judge wrote, and what it cost."""

    text: str
    prompt_tokens: int
    completion_tokens: int


class AnswerCache:
    """A file of answers by request, safe for several processes and against being killed.

    Only what the judge really wrote is kept, never a verdict or an error: parsing may become
    better, and a failure must be asked again.

    Args:
        path: the SQLite file; made with its folder if it is not there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._open() as database:
            database.execute(
                "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT)"
            )

    def get(self, request: Mapping[str, Any]) -> Answer | None:
        """The answer to a request, if it was given before."""
        with self._open() as database:
            row = database.execute(
                "SELECT answer FROM answers WHERE key = ?", (key_of(request),)
            ).fetchone()
        return None if row is None else Answer(**json.loads(row[0]))

    def put(self, request: Mapping[str, Any], answer: Answer) -> None:
        """Keep an answer; on disk when this returns."""
        with self._open() as database:
            database.execute(
                "INSERT OR REPLACE INTO answers VALUES (?, ?)",
                (key_of(request), json.dumps(asdict(answer))),
            )

    @contextmanager
    def _open(self) -> Generator[sqlite3.Connection]:
        # A connection of its own each time: they must not be shared between threads, and a request
        # to a judge takes a thousand times longer than this.
        with closing(sqlite3.connect(self.path, timeout=60)) as database, database:
            yield database


def key_of(request: Mapping[str, Any]) -> str:
    """The same for equal requests, whatever the order of their names."""
    text = json.dumps(request, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
