"""Stage 2: rows of text become groups of token ids, and every oddity on the way is counted.

Kinds of findings, beside those of ``encode``. Rows dropped: ``empty_prompt``, ``empty_chosen``,
``prompt_too_long``, ``chosen_too_long``, ``all_identical``, ``empty_pool``. Candidates dropped:
``empty_completion``, ``completion_too_long``, ``same_as_chosen``, ``same_as_rival``. Text cut:
``truncated_prompt`` and ``truncated_completion`` (which then has no EOS). Not made:
``no_noise_candidate``.
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
from mcpo.switched import with_two_switched

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TooLong = Literal["drop", "truncate_completion", "truncate_prompt", "error"]
PromptFormat = Literal["auto", "chat", "plain"]
NoiseCandidate = Literal["none", "add", "only"]

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
    noise_candidate: NoiseCandidate = "none"
    """Whether the chosen one with two tokens switched, of those before its end token, joins the
    pool (``add``) or is all of it (``only``)."""
    seed: int = 0
    """Of which tokens are switched."""

    def __post_init__(self) -> None:
        """Check the values."""
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(
                f"max_length must be at least 2, a token of prompt and one of completion, "
                f"got {self.max_length}"
            )
        if self.max_prompt_length is not None and self.max_prompt_length < 1:
            raise ValueError(f"max_prompt_length must be at least 1, got {self.max_prompt_length}")
        for name, choices in (
            ("too_long", TooLong),
            ("prompt_format", PromptFormat),
            ("noise_candidate", NoiseCandidate),
        ):
            value = getattr(self, name)
            if value not in get_args(choices):
                raise ValueError(f"{name} must be one of {get_args(choices)}, got {value!r}")


class _Completion(NamedTuple):
    """A candidate on its way into a group."""

    ids: tuple[int, ...]
    score: float | None


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
            if group is not None and config.noise_candidate != "none":
                group = _with_noise(group, encoder.end_id, config, tally)
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
    for ids, candidate in zip(encoded.completion_ids, row.candidates, strict=True):
        if ids is None:
            tally.add("empty_completion", row_id)
        else:
            completions.append(_Completion(ids, candidate.score))
    fitted = _fit(row_id, encoded.prompt_ids, completions, config, tally)
    if fitted is None:
        return None
    prompt_ids, (chosen, *pool) = fitted
    rivals = _distinct_rivals(row_id, chosen, pool, tally)
    if not rivals:
        return None
    candidates = (chosen, *rivals)
    known = any(one.score is not None for one in candidates)
    return TokenizedGroup(
        row_id=row_id,
        prompt_ids=prompt_ids,
        candidate_ids=tuple(one.ids for one in candidates),
        scores=tuple(one.score for one in candidates) if known else (),
    )


def _with_noise(
    group: TokenizedGroup, end_id: int, config: TokenConfig, tally: Tally
) -> TokenizedGroup | None:
    """The group with its noise candidate last, or alone; None where it is to be alone and is not.

    It is made of tokens, behind the limits: cut from text it would be another sequence, and the
    tokens switched might be those that are cut.
    """
    chosen = group.candidate_ids[0]
    body, end = (chosen[:-1], chosen[-1:]) if chosen[-1] == end_id else (chosen, ())
    switched = with_two_switched(body, f"{config.seed}/noise/{group.row_id}")
    if switched is None:
        tally.add("no_noise_candidate", group.row_id)
        return None if config.noise_candidate == "only" else group
    noise = (*switched, *end)
    kept = group.only((0,)) if config.noise_candidate == "only" else group
    if noise in kept.candidate_ids:
        tally.add("same_as_rival", group.row_id)
        return group
    return replace(
        kept,
        candidate_ids=(*kept.candidate_ids, noise),
        scores=(*kept.scores, None) if kept.scores else (),
        columns=(),
    )


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
    others = [one for one in pool if one.ids != chosen.ids]
    if not others:
        tally.add("all_identical" if pool else "empty_pool", row_id)
        return []
    for _ in range(len(pool) - len(others)):
        tally.add("same_as_chosen", row_id)
    # Of equals the first one stays.
    first: dict[tuple[int, ...], _Completion] = {}
    for one in others:
        first.setdefault(one.ids, one)
    rivals = list(first.values())
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
        longest = max(len(one.ids) for one in fitted)
        prompt = _fit_prompt(row_id, prompt_ids, longest, config, tally)
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
    for index, (ids, score) in enumerate(completions):
        if len(ids) <= room:
            fitted.append(_Completion(ids, score))
        elif config.too_long == "error":
            raise ValueError(
                f"row {row_id!r} has a completion of {len(ids)} tokens where its prompt leaves "
                f"room for {room} (max_length={config.max_length}); raise max_length or set "
                "too_long to 'drop' or 'truncate_completion'"
            )
        elif config.too_long == "truncate_completion":
            tally.add("truncated_completion", row_id)
            fitted.append(_Completion(ids[:room], score))
        elif index == 0:
            tally.add("chosen_too_long", row_id)
            return None
        else:
            tally.add("completion_too_long", row_id)
    return fitted
