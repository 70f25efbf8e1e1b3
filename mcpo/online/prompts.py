"""The prompts of an online run, with checks where a program is the judge."""

from __future__ import annotations

from pathlib import Path

from mcpo.data.conversation import read_prompt
from mcpo.data.sources import Record, decode
from mcpo.evaluate.verifiable import VerifiableItem, read_checks
from mcpo.online.plan import Prompt


def load_prompts(path: Path) -> list[Prompt]:
    """Prompts of a JSONL file with ``prompt`` and perhaps ``id``; rows to train on will do too.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is no row, two have one id, or there are none.
    """
    prompts = [
        Prompt(row_id=raw.row_id, prompt=read_prompt(raw, "prompt"))
        for raw in (decode(record) for record in _records(path))
    ]
    if len({prompt.row_id for prompt in prompts}) != len(prompts):
        raise ValueError(f"every prompt of {path} must have an id of its own, and two share one")
    if not prompts:
        raise ValueError(f"{path} must hold at least one prompt; it is empty")
    return prompts


def load_checks(path: Path) -> list[VerifiableItem]:
    """The same file's checks.

    Raises:
        ValueError: a prompt has none, or is a conversation.
    """
    return [
        VerifiableItem(
            item_id=raw.row_id,
            prompt=raw.text("prompt"),
            topic=raw.row_id,
            checks=read_checks(raw),
            unseen_kind=False,
        )
        for raw in (decode(record) for record in _records(path))
    ]


def _records(path: Path) -> list[Record]:
    if not path.is_file():
        found = "a folder" if path.is_dir() else "not there"
        raise FileNotFoundError(f"prompts must name a JSONL file, got {path}, which is {found}")
    return [
        Record(where=f"{path}:{number}", default_id=f"{path}:{number}", content=line)
        for number, line in enumerate(path.read_bytes().split(b"\n"), start=1)
        if line.strip()
    ]
