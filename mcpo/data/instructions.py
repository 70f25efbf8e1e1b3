"""Instructions that a program can check: how each kind is put into words, and its checker.

``passes`` adds what holds for every kind: the model ended its answer itself, and the answer has at
least three words, so that saying nothing never obeys an instruction.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from mcpo.data import checkers

Arg = int | str

MIN_WORDS = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One instruction of a prompt."""

    kind: str
    args: Mapping[str, Arg]


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """A family of instructions that share a checker."""

    checker: Callable[..., bool]
    phrasings: tuple[str, ...]
    """Ways to ask for it, with the arguments in braces."""
    choices: tuple[Mapping[str, Arg], ...] = ({},)
    """Arguments to choose from."""
    sets_length: bool = False
    """It says how long the answer is to be, so the prompt need not."""


KINDS: dict[str, Kind] = {
    "no_commas": Kind(
        checker=checkers.no_commas,
        phrasings=(
            "Do not use any commas.",
            "Write without commas.",
        ),
    ),
    "has_number": Kind(
        checker=checkers.has_number,
        phrasings=(
            "Include a number in digits.",
            "Mention at least one number, written in digits.",
        ),
    ),
    "has_quotation": Kind(
        checker=checkers.has_quotation,
        phrasings=(
            "Include a short quotation in double quotes.",
            'Put at least one word in "double quotes".',
        ),
    ),
    "ends_with_question": Kind(
        checker=checkers.ends_with_question,
        phrasings=(
            "End your answer with a question.",
            "The last character of your answer must be a question mark.",
        ),
    ),
    "asks_question": Kind(
        checker=checkers.asks_question,
        phrasings=(
            "Ask the reader a question in your answer.",
            "Include at least one question.",
        ),
    ),
    "at_most_words": Kind(
        checker=checkers.at_most_words,
        phrasings=(
            "Use at most {most} words.",
            "Answer in {most} words or fewer.",
        ),
        choices=(
            {"most": 10},
            {"most": 15},
            {"most": 20},
        ),
        sets_length=True,
    ),
    "at_least_words": Kind(
        checker=checkers.at_least_words,
        phrasings=(
            "Use at least {least} words.",
            "Write {least} words or more, but no more than three sentences.",
        ),
        choices=(
            {"least": 20},
            {"least": 25},
            {"least": 30},
        ),
        sets_length=True,
    ),
    "words_between": Kind(
        checker=checkers.words_between,
        phrasings=(
            "Use between {least} and {most} words.",
            "Your answer must have at least {least} and at most {most} words.",
        ),
        choices=(
            {"least": 10, "most": 20},
            {"least": 15, "most": 25},
            {"least": 20, "most": 30},
        ),
        sets_length=True,
    ),
    "at_most_characters": Kind(
        checker=checkers.at_most_characters,
        phrasings=(
            "Use at most {most} characters.",
            "Keep your answer under {most} characters.",
        ),
        choices=(
            {"most": 80},
            {"most": 120},
            {"most": 160},
        ),
        sets_length=True,
    ),
    "sentence_count": Kind(
        checker=checkers.sentence_count,
        phrasings=(
            "Answer in exactly {count} sentence(s).",
            "Your answer must have exactly {count} sentence(s).",
        ),
        choices=(
            {"count": 1},
            {"count": 2},
            {"count": 3},
        ),
        sets_length=True,
    ),
    "numbered_count": Kind(
        checker=checkers.numbered_count,
        phrasings=(
            "Answer only with a numbered list of exactly {count} short items.",
            "Give {count} short items, numbered 1 to {count}, and nothing else.",
        ),
        choices=(
            {"count": 2},
            {"count": 3},
            {"count": 4},
        ),
        sets_length=True,
    ),
    "short_words": Kind(
        checker=checkers.short_words,
        phrasings=(
            "Use only short words of at most {most} letters.",
            "No word may have more than {most} letters.",
        ),
        choices=(
            {"most": 8},
            {"most": 9},
            {"most": 10},
        ),
    ),
    "no_ing": Kind(
        checker=checkers.no_word_ends_with,
        phrasings=(
            "Do not use words that end in -{ending}.",
            'Avoid words ending in "{ending}".',
        ),
        choices=({"ending": "ing"},),
    ),
    "includes_word": Kind(
        checker=checkers.includes_word,
        phrasings=(
            'Include the word "{word}".',
            'Use the word "{word}" in your answer.',
        ),
        choices=(
            {"word": "simple"},
            {"word": "often"},
            {"word": "surprise"},
            {"word": "together"},
            {"word": "quiet"},
            {"word": "because"},
            {"word": "today"},
            {"word": "people"},
            {"word": "world"},
        ),
    ),
    "avoids_word": Kind(
        checker=checkers.avoids_word,
        phrasings=(
            'Do not use the word "{word}".',
            'Answer without the word "{word}".',
        ),
        choices=(
            {"word": "the"},
            {"word": "and"},
            {"word": "is"},
            {"word": "of"},
            {"word": "a"},
            {"word": "to"},
            {"word": "in"},
            {"word": "it"},
            {"word": "you"},
            {"word": "can"},
        ),
    ),
    "first_word_is_not": Kind(
        checker=checkers.first_word_is_not,
        phrasings=(
            'Do not begin your answer with the word "{word}".',
            'The first word must not be "{word}".',
        ),
        choices=(
            {"word": "The"},
            {"word": "A"},
        ),
    ),
    "no_digits": Kind(
        checker=checkers.no_digits,
        phrasings=(
            "Do not use any digits.",
            "Write numbers as words, never as digits.",
        ),
    ),
    "one_paragraph": Kind(
        checker=checkers.one_paragraph,
        phrasings=(
            "Write a single paragraph without line breaks.",
            "Answer on one line.",
        ),
        sets_length=True,
    ),
    "no_ly": Kind(
        checker=checkers.no_word_ends_with,
        phrasings=(
            "Do not use words that end in -{ending}.",
            'Avoid words ending in "{ending}".',
        ),
        choices=({"ending": "ly"},),
    ),
    "starts_with_letter": Kind(
        checker=checkers.starts_with_letter,
        phrasings=(
            "Begin your answer with the letter {letter}.",
            "The first letter of your answer must be {letter}.",
        ),
        choices=(
            {"letter": "T"},
            {"letter": "I"},
            {"letter": "S"},
            {"letter": "W"},
        ),
    ),
}
# A prompt may ask for both of a pair: they do not contradict each other, whatever the arguments.
PAIRS: tuple[tuple[str, str], ...] = (
    ("no_commas", "at_most_words"),
    ("ends_with_question", "at_most_words"),
    ("includes_word", "sentence_count"),
    ("avoids_word", "sentence_count"),
    ("includes_word", "at_most_words"),
    ("no_ing", "sentence_count"),
    ("first_word_is_not", "at_most_characters"),
    ("asks_question", "at_least_words"),
    ("avoids_word", "at_most_words"),
    ("no_commas", "sentence_count"),
    ("has_number", "words_between"),
    ("first_word_is_not", "avoids_word"),
)
# Asked for in the held-out split alone.
UNSEEN_KINDS = ("no_digits", "one_paragraph", "no_ly", "starts_with_letter")


def satisfies(check: Check, text: str) -> bool:
    """Whether a text obeys an instruction."""
    if check.kind not in KINDS:
        raise ValueError(f"kind must be one of {sorted(KINDS)}; got {check.kind!r}")
    return KINDS[check.kind].checker(text, **check.args)


def require_args(check: Check) -> None:
    """Refuse a check that its checker could not be called with.

    Raises:
        ValueError: the arguments have other names or types than those of its kind.
    """
    wanted = {name: type(value) for name, value in KINDS[check.kind].choices[0].items()}
    if {name: type(value) for name, value in check.args.items()} != wanted:
        shown = ", ".join(f"{name}: {kind.__name__}" for name, kind in wanted.items())
        raise ValueError(
            f"args of {check.kind} must be {{{shown}}}, no more and no less, "
            f"got {dict(check.args)!r}"
        )


def passes(check: Check, text: str, *, finished: bool) -> bool:
    """Whether a completion obeys, was ended by the model and has three words or more."""
    return finished and len(checkers.words(text)) >= MIN_WORDS and satisfies(check, text)
