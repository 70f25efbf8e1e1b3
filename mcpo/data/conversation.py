"""Prompts: plain text, lists of messages, and transcripts of ``Human:`` and ``Assistant:``."""

from __future__ import annotations

import re
from itertools import pairwise

from mcpo.data.raw import RawRow
from mcpo.records import Message

_ROLES = ("system", "developer", "user", "assistant", "tool")
_MARK = re.compile(r"\n\n(Human|Assistant):[ ]?")
_SPEAKER = {"Human": "user", "Assistant": "assistant"}


def read_prompt(raw: RawRow, column: str) -> str | tuple[Message, ...]:
    """A string, or a conversation that waits for the assistant.

    Raises:
        ValueError: it is neither, or the assistant has the last word.
    """
    if not isinstance(raw.value(column), list | tuple):
        if not isinstance(raw.value(column), str):
            raise raw.wrong(column, "text or a list of messages")
        return raw.text(column)
    return check_prompt(raw, column, read_messages(raw.entries(column)))


def check_prompt(raw: RawRow, column: str, messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The same messages, where an answer can follow them.

    Raises:
        ValueError: there are none, or the last is not the user's or a tool's.
    """
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        last = repr(messages[-1]["role"]) if messages else "no message"
        raise ValueError(
            f"{raw.where}: the conversation in column {column!r} must end with the user's turn, "
            f"got {last} last"
        )
    return messages


def read_messages(entries: tuple[RawRow, ...]) -> tuple[Message, ...]:
    """Messages of a known role with text.

    Raises:
        ValueError: a role is unknown, or role or content is no text.
    """
    messages: list[Message] = []
    for entry in entries:
        role = entry.text("role")
        if role not in _ROLES:
            raise ValueError(
                f"{entry.where}: column 'role' must be one of {', '.join(_ROLES)}, got {role!r}"
            )
        messages.append({"role": role, "content": entry.text("content")})
    return tuple(messages)


def parse_transcript(text: str) -> tuple[Message, ...] | None:
    """The messages of ``"\\n\\nHuman: ...\\n\\nAssistant: "``, or None where it is no such prompt.

    Turns alternate, so a mark that repeats the speaker is taken for text.
    """
    marks: list[re.Match[str]] = []
    for mark in _MARK.finditer(text):
        if not marks or mark[1] != marks[-1][1]:
            marks.append(mark)
    if not marks or marks[0].start() != 0 or marks[0][1] != "Human":
        return None
    if marks[-1][1] != "Assistant" or text[marks[-1].end() :].strip():
        return None
    return tuple(
        {"role": _SPEAKER[mark[1]], "content": text[mark.end() : following.start()]}
        for mark, following in pairwise(marks)
    )
