"""Every checker on texts that obey, texts that do not, and the odd ones."""

from __future__ import annotations

import pytest

from mcpo.data import checkers

# checker, arguments, texts that obey, texts that do not
CASES = [
    (
        checkers.no_commas,
        {},
        ["Cats sleep a lot.", "\u00c7a va; tr\u00e8s bien", ""],
        ["Cats, dogs", "1,000 cats", "\u732b\uff0c\u72d7"],
    ),
    (
        checkers.no_digits,
        {},
        ["Two cats", "", "Louis the Fourteenth"],
        ["2 cats", "room 101", "\u0663 cats"],
    ),
    (checkers.has_number, {}, ["In 1969 it flew.", "No. 7"], ["In the sixties", "", "   "]),
    (
        checkers.has_quotation,
        {},
        ['He said "yes".', "\u201cYes\u201d it is"],
        ["He said yes", 'a " b', 'empty ""', "'single'", ""],
    ),
    (
        checkers.ends_with_question,
        {},
        ["Is it?", "It is. Why?", 'He asked "why?"', "Why\u2026?", "What!?"],
        ["It is.", "Is it? Yes", "What?!", "Is it? :)", ""],
    ),
    (
        checkers.asks_question,
        {},
        ["Is it? Yes it is.", "Why?", "What?! No."],
        ["It is.", "see a?b=c here", ""],
    ),
    (
        checkers.one_paragraph,
        {},
        ["One line. And more."],
        ["One\ntwo", "One\n\ntwo", "One\r\ntwo", "One\u2028two", ""],
    ),
    (
        checkers.at_most_words,
        {"most": 3},
        ["one two three", "don't you know", "", "well-known cats sleep"],
        ["one two three four", "a - b c d"],
    ),
    (
        checkers.at_least_words,
        {"least": 3},
        ["one two three", "one, two; three four", "the na\u00efve caf\u00e9"],
        ["one two", "... --- ...", ""],
    ),
    (
        checkers.words_between,
        {"least": 2, "most": 3},
        ["one two", "one two three"],
        ["one", "one two three four", ""],
    ),
    (
        checkers.at_most_characters,
        {"most": 5},
        ["12345", "", "\u00e9t\u00e9s!"],
        ["123456", "1 2 3 4"],
    ),
    (
        checkers.sentence_count,
        {"count": 2},
        ["One. Two.", "One! Two?", "One. Two", 'He said "one." Then two.', "It is 3.5 m. Wow!"],
        ["One.", "One. Two. Three.", "1. One\n2. Two", "- One.\n- Two.", "", "..."],
    ),
    (
        checkers.sentence_count,
        {"count": 1},
        ["One.", "Just this", "It costs 3.50 today.", "Stop!!!"],
        ["One. Two.", "", "?!"],
    ),
    (
        checkers.numbered_count,
        {"count": 2},
        ["1. One\n2. Two", "1) One\n\n2) Two", " 1. One\n 2. Two"],
        [
            "1. One",
            "1. One\n2. Two\n3. Three",
            "Here:\n1. One\n2. Two",
            "2. Two\n1. One",
            "- One\n- Two",
            "1.\n2.",
            "",
        ],
    ),
    (
        checkers.short_words,
        {"most": 4},
        ["a tiny cat", "", "\u00e9t\u00e9 now"],
        ["a large cat", "well-set"],
    ),
    (
        checkers.no_word_ends_with,
        {"ending": "ing"},
        ["It is done", "ingots here", ""],
        ["Going home", "GOING home", "a king"],
    ),
    (
        checkers.includes_word,
        {"word": "cat"},
        ["The cat sleeps", "CAT!", "a (cat)"],
        ["Cats sleep", "concatenate", "cat-like", ""],
    ),
    (
        checkers.avoids_word,
        {"word": "the"},
        ["A cat", "then they left", ""],
        ["The cat", "see the."],
    ),
    (
        checkers.first_word_is_not,
        {"word": "The"},
        ["A cat", "Then the", "1. The"],
        ["The cat", '"The cat"', "the cat", "**The** cat"],
    ),
    (
        checkers.starts_with_letter,
        {"letter": "T"},
        ["The cat", "tea", '"Tea"', "**Tea**"],
        ["A tea", "1 tea", "", "..."],
    ),
]
IDS = [f"{checker.__name__}-{args}" for checker, args, _, _ in CASES]


@pytest.mark.parametrize(("checker", "args", "obeying", "failing"), CASES, ids=IDS)
def test_checker(checker, args, obeying, failing):
    assert [text for text in obeying if not checker(text, **args)] == []
    assert [text for text in failing if checker(text, **args)] == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        (" \n\t ", []),
        ("don't stop", ["don't", "stop"]),
        ("well\u2019s end", ["well\u2019s", "end"]),
        ("a-b - c", ["a-b", "c"]),
        ("\u00fcber \u732b!", ["\u00fcber", "\u732b"]),
    ],
)
def test_words(text, expected):
    assert checkers.words(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", 0),
        ("...", 0),
        ("No stop", 1),
        ("One. Two! Three?", 3),
        ("See www.example.org for 3.5 tips.", 1),
        ('"Stop!" she said.', 2),
        ("Wait\u2026 what?!", 2),
    ],
)
def test_count_sentences(text, expected):
    assert checkers.count_sentences(text) == expected
