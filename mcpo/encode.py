"""From one row of text to token ids: where the prompt ends and how a completion closes.

The border is found in token space: a completion is what the tokens of the whole rendering hold
after the exact tokens of the prompt. Cutting text and tokenizing the pieces gives other tokens
where a merge crosses the border.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

from mcpo.findings import Tally

if TYPE_CHECKING:
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerBase

    from mcpo.records import CandidateRow, Message

# Long and odd enough not to occur in a template of its own accord.
_PROBE = "zqxjkvb"


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoder:
    """A tokenizer with what has been found out about it."""

    tokenizer: PreTrainedTokenizerBase
    chat: bool
    """Whether prompts are rendered by the chat template."""
    chat_template: str | None
    """In place of the tokenizer's own."""
    bos_id: int | None
    adds_bos: bool
    """Whether the tokenizer puts BOS before plain text."""
    end_id: int
    """What a completion ends with: the template's end of turn, or EOS."""
    tail_ids: tuple[int, ...]
    """What the template writes behind the end of turn, and a completion does not hold."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedRow:
    """Token ids of a row before any limit; an empty completion is None."""

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[tuple[int, ...] | None, ...]


def make_encoder(
    tokenizer: PreTrainedTokenizerBase, *, prompt_format: str, chat_template: str | None
) -> Encoder:
    """Find out how ``tokenizer`` begins a text and ends a turn.

    Raises:
        ValueError: it has no EOS, or chat is asked for and there is no template.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "the tokenizer must have an EOS token, or the model never learns to stop; "
            "set tokenizer.eos_token"
        )
    has_template = bool(chat_template or tokenizer.chat_template)
    if prompt_format == "chat" and not has_template:
        raise ValueError(
            "prompt_format='chat' needs a chat template and the tokenizer has none; "
            "set chat_template or prompt_format='plain'"
        )
    plain = Encoder(
        tokenizer=tokenizer,
        chat=False,
        chat_template=chat_template,
        bos_id=cast("int | None", tokenizer.bos_token_id),
        adds_bos=tokenizer.bos_token_id in cast("list[int]", tokenizer("")["input_ids"]),
        end_id=cast(int, tokenizer.eos_token_id),
        tail_ids=(),
    )
    return _with_template(plain) if has_template and prompt_format != "plain" else plain


def encode(rows: Sequence[CandidateRow], encoder: Encoder, tally: Tally) -> list[EncodedRow]:
    """Token ids of rows, all texts through the tokenizer together.

    Counts ``prompt_not_prefix``, ``doubled_bos``, ``doubled_eos``, ``eos_inside`` and
    ``missing_eos`` (the template does not close its turns; EOS is appended) and ``unfinished`` (a
    candidate marked as cut, which gets no EOS).

    Raises:
        ValueError: a conversation and no chat template, or a template that refuses a conversation.
    """
    prompts = [_render(row.prompt, None, encoder, row.row_id) for row in rows]
    wholes = [
        [
            _render(row.prompt, one.text, encoder, row.row_id) if one.text.strip() else None
            for one in row.candidates
        ]
        for row in rows
    ]
    whole_ids = iter(
        _tokenize([text for texts in wholes for text in texts if text is not None], encoder)
    )
    encoded: list[EncodedRow] = []
    for row, prompt, texts, ids in zip(
        rows, prompts, wholes, _tokenize(prompts, encoder), strict=True
    ):
        completions: list[tuple[int, ...] | None] = []
        for candidate, text in zip(row.candidates, texts, strict=True):
            if text is None:
                completions.append(None)
                continue
            after = _after_prompt(ids, next(whole_ids))
            if after is None:
                tally.add("prompt_not_prefix", row.row_id)
                after = _tokenize_apart(prompt, text, candidate.text, encoder)
            closed = _close(after, encoder, tally, row.row_id)
            if not candidate.finished and len(closed) > 1:
                tally.add("unfinished", row.row_id)
                closed = closed[:-1]
            completions.append(closed)
        encoded.append(
            EncodedRow(
                prompt_ids=_open(ids, encoder, tally, row.row_id),
                completion_ids=tuple(completions),
            )
        )
    return encoded


def encode_prompt(
    prompt: str | tuple[Message, ...], encoder: Encoder, row_id: str
) -> tuple[int, ...]:
    """Token ids up to where the answer begins, those that ``encode`` gives a row of this prompt.

    Raises:
        ValueError: as ``encode``.
    """
    (ids,) = _tokenize([_render(prompt, None, encoder, row_id)], encoder)
    return _open(ids, encoder, Tally(), row_id)


def _render(
    prompt: str | tuple[Message, ...], completion: str | None, encoder: Encoder, row_id: str
) -> str:
    """The prompt as text, ready for an answer, or the prompt with its answer."""
    if encoder.chat:
        messages: list[Message] = (
            [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        )
        return _apply_template(messages, completion, encoder, row_id)
    if not isinstance(prompt, str):
        raise ValueError(
            f"row {row_id!r} holds a conversation, which needs a chat template to become text; "
            "use a tokenizer that has one, set chat_template, or give the prompt as one string"
        )
    return prompt + (completion or "")


def _apply_template(
    messages: list[Message], completion: str | None, encoder: Encoder, row_id: str
) -> str:
    from jinja2 import TemplateError

    answer: list[Message] = (
        [] if completion is None else [{"role": "assistant", "content": completion}]
    )
    try:
        text = encoder.tokenizer.apply_chat_template(
            [{"role": one["role"], "content": one["content"]} for one in (*messages, *answer)],
            chat_template=encoder.chat_template,
            tokenize=False,
            add_generation_prompt=completion is None,
        )
    except TemplateError as error:
        roles = [message["role"] for message in messages]
        raise ValueError(
            f"row {row_id!r} has a conversation that the chat template refuses ({error}); "
            f"its roles are {roles}"
        ) from error
    return cast(str, text)


def _tokenize(texts: Sequence[str], encoder: Encoder) -> list[tuple[int, ...]]:
    """Ids of each text and nothing added: the template or ``_open`` brings BOS."""
    if not texts:
        return []
    ids = encoder.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    return [tuple(one) for one in cast("list[list[int]]", ids)]


def _tokenize_apart(prompt: str, whole: str, completion: str, encoder: Encoder) -> tuple[int, ...]:
    """The completion tokenized alone, with what the template writes behind it."""
    if whole.startswith(prompt):
        return _tokenize([whole[len(prompt) :]], encoder)[0]
    # The template writes the prompt otherwise once it is answered: only the completion is sure.
    (ids,) = _tokenize([completion], encoder)
    return (*ids, encoder.end_id, *encoder.tail_ids)


def _after_prompt(
    prompt_ids: tuple[int, ...], whole_ids: tuple[int, ...]
) -> tuple[int, ...] | None:
    """What follows the exact tokens of the prompt; None where a merge crosses the border."""
    border = len(prompt_ids)
    return whole_ids[border:] if whole_ids[:border] == prompt_ids else None


def _open(
    prompt_ids: tuple[int, ...], encoder: Encoder, tally: Tally, row_id: str
) -> tuple[int, ...]:
    """The prompt with BOS where the tokenizer wants one, and never two."""
    bos_id = encoder.bos_id
    if bos_id is None:
        return prompt_ids
    ids = (bos_id, *prompt_ids) if encoder.adds_bos else prompt_ids
    begin = 0
    while ids[begin : begin + 2] == (bos_id, bos_id):
        begin += 1
    if begin:
        tally.add("doubled_bos", row_id)
    return ids[begin:]


def _close(ids: tuple[int, ...], encoder: Encoder, tally: Tally, row_id: str) -> tuple[int, ...]:
    """The completion with exactly one end token, the last one."""
    end_id = encoder.end_id
    if encoder.chat:
        tail = len(encoder.tail_ids)
        bare = ids[: len(ids) - tail] if ids[len(ids) - tail :] == encoder.tail_ids else ids
        if bare[-1:] == (end_id,):
            ids = bare[:-1]
        else:
            tally.add("missing_eos", row_id)
    end = len(ids)
    while end and ids[end - 1] == end_id:
        end -= 1
    if end < len(ids):
        tally.add("doubled_eos", row_id)
    if end_id in ids[:end]:
        tally.add("eos_inside", row_id)
    return (*ids[:end], end_id)


def _with_template(plain: Encoder) -> Encoder:
    """Read off a probe conversation what the template writes behind an answer."""
    chat = replace(plain, chat=True, adds_bos=False)
    question: list[Message] = [{"role": "user", "content": _PROBE}]
    whole = _apply_template(question, _PROBE, chat, "probe")
    if whole.count(_PROBE) < 2:
        raise ValueError(
            "the chat template must write the text of the user's turn and of the assistant's, got "
            f"{whole!r} for a conversation of {_PROBE!r} and {_PROBE!r}; use another chat_template"
        )
    (tail,) = _tokenize([whole[whole.rindex(_PROBE) + len(_PROBE) :]], chat)
    special = {plain.end_id, *_special_ids(plain.tokenizer)}
    # Some templates end a turn with a token of their own (Gemma: <end_of_turn>) rather than EOS.
    enders = [i for i, token in enumerate(tail) if token in special]
    eos = [i for i in enders if tail[i] == plain.end_id]
    if not enders:
        return replace(chat, tail_ids=tail)
    border = (eos or enders)[0]
    return replace(chat, end_id=tail[border], tail_ids=tail[border + 1 :])


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that text cannot spell."""
    added = cast("dict[int, AddedToken]", tokenizer.added_tokens_decoder)
    return {token_id for token_id, token in added.items() if token.special}
