"""Checkers: does a text do what an instruction asks for?

Each is a pure function ``(text, **args) -> bool`` of a text without blanks around it. How the
instructions are put into words, and what every answer must be besides, is in ``instructions.py``.
"""

from __future__ import annotations

import re

_WORD = re.compile(r"\w+(?:['\u2019-]\w+)*")
# A full stop inside a number or a web address does not end a sentence: a blank, a closing mark or
# the end of the text must follow.
_SENTENCE_END = re.compile(r"[.!?\u2026]+[\"'\u201d\u2019)\]*]*(?=\s|$)")
_LIST_MARK = re.compile(r"\s*(?:[-*\u2022]|\d+[.)])\s+")
_NUMBERED = re.compile(r"(\d+)[.)]\s+\S")


def words(text: str) -> list[str]:
    """The words of a text; "don't" and "well-known" are one word each."""
    return _WORD.findall(text)


def count_sentences(text: str) -> int:
    """How many sentences a text has; a last one without a full stop counts too."""
    parts = _SENTENCE_END.split(text)
    return sum(1 for part in parts if words(part))


def no_commas(text: str) -> bool:
    """No comma."""
    return "," not in text and "\uff0c" not in text


def no_digits(text: str) -> bool:
    """No digit of any script."""
    return not has_number(text)


def has_number(text: str) -> bool:
    """At least one digit."""
    return any(character.isdigit() for character in text)


def has_quotation(text: str) -> bool:
    """At least one word in double quotes, straight or curly."""
    return (
        re.search(r"[\"\u201c][^\"\u201c\u201d]*\w[^\"\u201c\u201d]*[\"\u201d]", text) is not None
    )


def ends_with_question(text: str) -> bool:
    """The last character is a question mark; a closing quote may follow it."""
    return text.rstrip("\"'\u201d\u2019").endswith("?")


def asks_question(text: str) -> bool:
    """At least one sentence ends with a question mark."""
    return any("?" in match.group() for match in _SENTENCE_END.finditer(text))


def one_paragraph(text: str) -> bool:
    """No line break."""
    return len(text.splitlines()) == 1


def at_most_words(text: str, *, most: int) -> bool:
    """No more than that many words."""
    return len(words(text)) <= most


def at_least_words(text: str, *, least: int) -> bool:
    """No fewer than that many words."""
    return len(words(text)) >= least


def words_between(text: str, *, least: int, most: int) -> bool:
    """So many words, both ends included."""
    return least <= len(words(text)) <= most


def at_most_characters(text: str, *, most: int) -> bool:
    """No more than that many characters, blanks included."""
    return len(text) <= most


def sentence_count(text: str, *, count: int) -> bool:
    """Exactly so many sentences, in running text."""
    lines = text.splitlines()
    return count_sentences(text) == count and not any(_LIST_MARK.match(line) for line in lines)


def numbered_count(text: str, *, count: int) -> bool:
    """Exactly so many lines, numbered from 1; nothing before, between or after them."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    numbers = [_NUMBERED.match(line) for line in lines]
    return [found and found.group(1) for found in numbers] == [str(n + 1) for n in range(count)]


def short_words(text: str, *, most: int) -> bool:
    """No word has more letters than that."""
    return all(len(word) <= most for word in words(text))


def no_word_ends_with(text: str, *, ending: str) -> bool:
    """No word has that ending."""
    return not any(word.lower().endswith(ending.lower()) for word in words(text))


def includes_word(text: str, *, word: str) -> bool:
    """The word stands there as a word of its own, in any case."""
    return word.lower() in (found.lower() for found in words(text))


def avoids_word(text: str, *, word: str) -> bool:
    """The word does not stand there as a word of its own, in any case."""
    return not includes_word(text, word=word)


def first_word_is_not(text: str, *, word: str) -> bool:
    """The first word is another one, in any case."""
    return [found.lower() for found in words(text)[:1]] != [word.lower()]


def starts_with_letter(text: str, *, letter: str) -> bool:
    """The first letter or digit is that letter, in any case."""
    found = re.search(r"[^\W_]", text)
    return found is not None and found.group().lower() == letter.lower()
