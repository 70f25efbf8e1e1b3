"""TRL's preference columns: ``prompt``, ``chosen`` and ``rejected``, as text or as messages.

``rejected`` may be a list of several. The prompt may be left out where chosen and rejected hold the
whole conversation, or the whole text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import cast

from mcpo.data.conversation import check_prompt, parse_transcript, read_messages, read_prompt
from mcpo.data.ranking import with_pool
from mcpo.data.raw import RawRow
from mcpo.findings import Tally
from mcpo.records import Candidate, CandidateRow, Message

_ANSWER_MARK = "\n\nAssistant:"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Side:
    """A completion and the conversation that came with it."""

    before: tuple[Message, ...]
    text: str


def read_preference(raw: RawRow, *, tally: Tally) -> CandidateRow | None:
    """The chosen one against the rejected ones, in the order they came.

    Raises:
        ValueError: a column is missing or wrong, nothing is rejected, or chosen and rejected
            continue different prompts.
    """
    sides = [_side(raw, "chosen"), *_rejected(raw)]
    for side in sides[1:]:
        if side.before != sides[0].before:
            raise ValueError(
                f"{raw.where}: columns 'chosen' and 'rejected' must hold the same conversation "
                "up to their last message, got different ones"
            )
    if raw.has("prompt"):
        prompt, texts = _given_prompt(raw, sides[0].before), [side.text for side in sides]
    else:
        prompt, texts = _implied_prompt(raw, sides)
    scores = [raw.optional_number("score_chosen"), *_rejected_scores(raw, len(texts) - 1)]
    chosen, *pool = [
        Candidate(text=text, score=score) for text, score in zip(texts, scores, strict=True)
    ]
    return with_pool(raw, prompt, chosen, pool, tally=tally)


def _side(raw: RawRow, column: str) -> _Side:
    """A string, or messages of which the last is the completion."""
    value = raw.value(column)
    if isinstance(value, str):
        return _Side(before=(), text=raw.text(column))
    if not isinstance(value, list | tuple):
        raise raw.wrong(column, "text or a list of messages")
    messages = read_messages(raw.entries(column))
    if not messages or messages[-1]["role"] != "assistant":
        last = repr(messages[-1]["role"]) if messages else "no message"
        raise ValueError(
            f"{raw.where}: the messages in column {column!r} must end with the assistant's, "
            f"got {last} last"
        )
    return _Side(before=messages[:-1], text=messages[-1]["content"])


def _rejected(raw: RawRow) -> list[_Side]:
    """One side, or several where the column is a list of texts or of conversations."""
    value = raw.value("rejected")
    if isinstance(value, str) or not isinstance(value, list | tuple):
        return [_side(raw, "rejected")]
    several = cast("list[object]", value)
    if not several:
        raise ValueError(f"{raw.where}: column 'rejected' must hold at least one, got none")
    if isinstance(several[0], Mapping):
        return [_side(raw, "rejected")]
    names = [f"rejected[{index}]" for index in range(len(several))]
    spread = replace(raw, values=dict(zip(names, several, strict=True)))
    return [_side(spread, name) for name in names]


def _rejected_scores(raw: RawRow, num_rejected: int) -> list[float | None]:
    """One score a rejected completion; None where there are none."""
    if not raw.has("score_rejected"):
        return [None] * num_rejected
    value = raw.value("score_rejected")
    scores = cast("list[object]", value) if isinstance(value, list | tuple) else [value]
    if len(scores) != num_rejected:
        raise raw.wrong("score_rejected", f"one score for each of {num_rejected} rejected")
    names = [f"score_rejected[{index}]" for index in range(num_rejected)]
    spread = replace(raw, values=dict(zip(names, scores, strict=True)))
    return [spread.number(name) for name in names]


def _given_prompt(raw: RawRow, before: tuple[Message, ...]) -> str | tuple[Message, ...]:
    """The prompt column, which the messages of chosen and rejected may repeat."""
    prompt = read_prompt(raw, "prompt")
    if not before:
        return (parse_transcript(prompt) or prompt) if isinstance(prompt, str) else prompt
    # A string stands for the user's last turn: the messages know of a system prompt, it does not.
    repeated = before[-1]["content"] if isinstance(prompt, str) else before
    if repeated != prompt:
        raise ValueError(
            f"{raw.where}: the messages in column 'chosen' must begin with those of 'prompt' or be "
            "the answer alone, got another conversation"
        )
    return check_prompt(raw, "chosen", before)


def _implied_prompt(raw: RawRow, sides: list[_Side]) -> tuple[str | tuple[Message, ...], list[str]]:
    """The prompt that chosen and rejected begin with, and what each goes on with."""
    texts = [side.text for side in sides]
    if not isinstance(raw.value("chosen"), str):
        return check_prompt(raw, "chosen", sides[0].before), texts
    common = _common_beginning(texts)
    mark = common.rfind(_ANSWER_MARK)
    if mark >= 0:
        end = mark + len(_ANSWER_MARK)
        end += common[end : end + 1] == " "
        prompt = parse_transcript(common[:end]) or common[:end]
    else:
        # Answers may begin alike: cut before the last word they share part of, never inside one.
        end = max(common.rfind(" "), common.rfind("\n"))
        prompt = common[:end]
    if end <= 0:
        raise ValueError(
            f"{raw.where} has no column 'prompt', and 'chosen' and 'rejected' do not begin with "
            "the same text that could be it; add the column"
        )
    return prompt, [text[end:] for text in texts]


def _common_beginning(texts: list[str]) -> str:
    # What the first and the last in sorted order share, all between them share too.
    first, last = min(texts), max(texts)
    differs = (index for index, (a, b) in enumerate(zip(first, last, strict=False)) if a != b)
    return first[: next(differs, len(first))]
