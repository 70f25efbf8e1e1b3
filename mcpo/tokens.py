"""Stage 2: rows of text become groups of token ids, and every oddity on the way is counted.

Kinds of findings, beside those of ``encode``. Rows dropped: ``empty_prompt``, ``empty_chosen``,
``prompt_too_long``, ``chosen_too_long``, ``all_identical``, ``empty_pool``. Candidates dropped:
``empty_completion``, ``completion_too_long``, ``same_as_chosen``, ``same_as_rival``. Text cut:
``truncated_prompt`` and ``truncated_completion`` (which then has no EOS).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import numpy as np

from mcpo.encode import EncodedRow, encode, make_encoder
from mcpo.findings import Finding, Tally, describe
from mcpo.records import CandidateRow, TokenizedGroup

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TooLong = Literal["drop", "truncate_completion", "truncate_prompt", "error"]
PromptFormat = Literal["auto", "chat", "plain"]

# Rows whose texts go through the tokenizer in one call: enough for its threads, little memory.
_ROWS_PER_CALL = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenConfig:
    """How text becomes tokens."""

    max_length: int | None = 1024
    """Tokens of prompt and completion together, EOS included; None for no limit."""
    max_prompt_length: int | None = None
    """Tokens of the prompt alone; None for no limit of its own."""
    too_long: TooLong = "truncate_completion"
    """``drop`` the candidate, or the row if it is the prompt or the chosen one; cut completions at
    their end (a prompt that leaves no room drops the row); cut the prompt at its front, for the
    longest candidate; or stop with an ``error``."""
    prompt_format: PromptFormat = "auto"
    """``chat`` renders prompts by the chat template, a string as one user turn; ``plain`` takes
    strings as they are; ``auto`` is ``chat`` wherever there is a template."""
    chat_template: str | None = None
    """A Jinja template in place of the tokenizer's own."""

    def __post_init__(self) -> None:
        """Check the values."""
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(
                f"max_length must be at least 2, a token of prompt and one of completion, "
                f"got {self.max_length}"
            )
        if self.max_prompt_length is not None and self.max_prompt_length < 1:
            raise ValueError(f"max_prompt_length must be at least 1, got {self.max_prompt_length}")
        for name, choices in (("too_long", TooLong), ("prompt_format", PromptFormat)):
            value = getattr(self, name)
            if value not in get_args(choices):
                raise ValueError(f"{name} must be one of {get_args(choices)}, got {value!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenReport:
    """The groups and what was dropped or changed to get them."""

    groups: tuple[TokenizedGroup, ...]
    findings: tuple[Finding, ...]


def tokenize(
    rows: Sequence[CandidateRow], tokenizer: PreTrainedTokenizerBase, config: TokenConfig
) -> TokenReport:
    """Tokenize rows in their order.

    Raises:
        ValueError: nothing is left, a text is too long and ``too_long`` is ``error``, the tokenizer
            has no EOS, or a prompt cannot be rendered.
    """
    encoder = make_encoder(
        tokenizer, prompt_format=config.prompt_format, chat_template=config.chat_template
    )
    tally = Tally()
    groups: list[TokenizedGroup] = []
    known: dict[int, int] = {}
    for begin in range(0, len(rows), _ROWS_PER_CALL):
        some = rows[begin : begin + _ROWS_PER_CALL]
        for row, encoded in zip(some, encode(some, encoder, tally), strict=True):
            group = _group(row, encoded, config, tally)
            if group is not None:
                groups.append(_sharing_ids(group, known))
    findings = tally.findings()
    if not groups:
        raise ValueError(
            f"no row is left of {len(rows)} after tokenization: {describe(findings)}; "
            "look at max_length, too_long and the data"
        )
    return TokenReport(groups=tuple(groups), findings=findings)


def token_hash(group: TokenizedGroup) -> str:
    """SHA-256 over the ids of a group and their borders: the same hash, the same tokens."""
    digest = hashlib.sha256()
    for ids in (group.prompt_ids, *group.scored_ids):
        digest.update(np.array((len(ids), *ids), dtype="<i8").tobytes())
    return digest.hexdigest()


class _Completion(NamedTuple):
    """A completion and its place among the candidates of its row."""

    place: int
    ids: tuple[int, ...]


def _group(
    row: CandidateRow, encoded: EncodedRow, config: TokenConfig, tally: Tally
) -> TokenizedGroup | None:
    """The group of one row within the limits, or None where nothing can be learnt from it."""
    row_id = row.row_id
    if not encoded.prompt_ids:
        tally.add("empty_prompt", row_id)
        return None
    if encoded.completion_ids[0] is None:
        tally.add("empty_chosen", row_id)
        return None
    completions: list[_Completion] = []
    for place, ids in enumerate(encoded.completion_ids):
        if ids is None:
            tally.add("empty_completion", row_id)
        else:
            completions.append(_Completion(place, ids))
    fitted = _fit(row_id, encoded.prompt_ids, completions, config, tally)
    if fitted is None:
        return None
    prompt_ids, (chosen, *pool) = fitted
    rivals = _distinct_rivals(row_id, chosen, pool, tally)
    if not rivals:
        return None
    ratings = row_ratings(row)
    return TokenizedGroup(
        row_id=row_id,
        prompt_ids=prompt_ids,
        candidate_ids=(chosen.ids, *(rival.ids for rival in rivals)),
        ratings=ratings and tuple(ratings[one.place] for one in (chosen, *rivals)),
    )


def row_ratings(row: CandidateRow) -> tuple[float, ...] | None:
    """A number for each candidate, larger for better ones: its score, or else minus its rank.

    None unless every candidate has a score or every one a rank.
    """
    scores = [one.score for one in row.candidates if one.score is not None]
    if len(scores) == len(row.candidates):
        return tuple(scores)
    ranks = [-one.rank for one in row.candidates if one.rank is not None]
    return tuple(ranks) if len(ranks) == len(row.candidates) else None


def _sharing_ids(group: TokenizedGroup, known: dict[int, int]) -> TokenizedGroup:
    """The same group, made of the number objects in ``known``.

    A tokenizer makes a new object of 32 bytes for each token; one for each id of the vocabulary
    leaves 8 bytes a token.
    """

    def shared(ids: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(known.setdefault(token_id, token_id) for token_id in ids)

    candidate_ids = tuple(shared(ids) for ids in group.candidate_ids)
    return replace(group, prompt_ids=shared(group.prompt_ids), candidate_ids=candidate_ids)


def _distinct_rivals(
    row_id: str, chosen: _Completion, pool: list[_Completion], tally: Tally
) -> list[_Completion]:
    """Rivals that differ from the chosen one and from one another, which cutting may undo."""
    others = [rival for rival in pool if rival.ids != chosen.ids]
    if not others:
        tally.add("all_identical" if pool else "empty_pool", row_id)
        return []
    for _ in range(len(pool) - len(others)):
        tally.add("same_as_chosen", row_id)
    # Read backwards, so that of equals the first stays.
    first = {rival.ids: rival for rival in reversed(others)}
    rivals = [rival for rival in others if first[rival.ids] is rival]
    for _ in range(len(others) - len(rivals)):
        tally.add("same_as_rival", row_id)
    return rivals


def _fit(
    row_id: str,
    prompt_ids: tuple[int, ...],
    completions: list[_Completion],
    config: TokenConfig,
    tally: Tally,
) -> tuple[tuple[int, ...], list[_Completion]] | None:
    """Prompt and completions within the limits, the chosen one still first; None drops the row."""
    # When the prompt is what gives way, a completion only has to leave it one token.
    if config.max_length is not None and config.too_long == "truncate_prompt":
        fitted = _fit_completions(row_id, completions, config.max_length - 1, config, tally)
        if fitted is None:
            return None
        prompt = _fit_prompt(row_id, prompt_ids, max(len(one.ids) for one in fitted), config, tally)
        return None if prompt is None else (prompt, fitted)
    prompt = _fit_prompt(row_id, prompt_ids, 1, config, tally)
    if prompt is None:
        return None
    if config.max_length is None:
        return prompt, completions
    room = config.max_length - len(prompt)
    fitted = _fit_completions(row_id, completions, room, config, tally)
    return None if fitted is None else (prompt, fitted)


def _fit_prompt(
    row_id: str, prompt_ids: tuple[int, ...], reserve: int, config: TokenConfig, tally: Tally
) -> tuple[int, ...] | None:
    """The prompt, or its last tokens, with room for ``reserve`` tokens behind it."""
    own = config.max_prompt_length
    limits = [] if own is None else [own]
    if config.max_length is not None:
        limits.append(config.max_length - reserve)
    limit = min(limits, default=len(prompt_ids))
    if len(prompt_ids) <= limit:
        return prompt_ids
    if config.too_long == "error":
        raise ValueError(
            f"row {row_id!r} has a prompt of {len(prompt_ids)} tokens where {limit} fit "
            f"(max_length={config.max_length}, max_prompt_length={own}); raise the limit or set "
            "too_long to 'drop' or 'truncate_prompt'"
        )
    if config.too_long == "truncate_prompt":
        tally.add("truncated_prompt", row_id)
        return prompt_ids[-limit:]
    tally.add("prompt_too_long", row_id)
    return None


def _fit_completions(
    row_id: str,
    completions: list[_Completion],
    room: int,
    config: TokenConfig,
    tally: Tally,
) -> list[_Completion] | None:
    """Completions of at most ``room`` tokens, cut or dropped; None if the chosen one is dropped."""
    fitted: list[_Completion] = []
    for one in completions:
        place, ids = one
        if len(ids) <= room:
            fitted.append(one)
        elif config.too_long == "error":
            raise ValueError(
                f"row {row_id!r} has a completion of {len(ids)} tokens where its prompt leaves "
                f"room for {room} (max_length={config.max_length}); raise max_length or set "
                "too_long to 'drop' or 'truncate_completion'"
            )
        elif config.too_long == "truncate_completion":
            tally.add("truncated_completion", row_id)
            fitted.append(_Completion(place, ids[:room]))
        elif place == 0:
            tally.add("chosen_too_long", row_id)
            return None
        else:
            tally.add("completion_too_long", row_id)
    return fitted
