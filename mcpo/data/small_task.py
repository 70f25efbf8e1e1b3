"""A verifiable task of few words, for studies that train many models in minutes.

A prompt is one to three instructions in telegram style, an answer is words of a list of forty, with
commas, numbers and full stops, and the checks are those of the large task. A model from scratch
first learns texts of which a share obeys and the rest is random, so what it writes obeys now and
then: as the reference it is a broad proposal, and its own samples make the pools.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from mcpo.data.instructions import Arg, Check, passes
from mcpo.data.prompts import VerifiablePrompt

# fmt: off
WORDS = (
    "river", "stone", "hill", "tree", "bird", "cloud", "rain", "snow",
    "wind", "sun", "moon", "star", "night", "day", "road", "house",
    "door", "window", "table", "chair", "bread", "milk", "salt", "apple",
    "pear", "cat", "dog", "horse", "fish", "boat", "sea", "sand",
    "fire", "lamp", "book", "song", "story", "child", "friend", "garden",
)
# fmt: on
NUMBERS = tuple("123456789")
# What instructions are put in, besides.
INSTRUCTING = (
    *("at", "most", "least", "words", "include", "avoid", "not", "first", "no", "comma"),
    *("number", "question", "count"),
)
# How often a learnt text obeys by design; others obey by chance.
OBEYING = 0.25
_TRIES = 400
# What no sentence ends with, and what it does.
_INSIDE, _ENDS = (",", *NUMBERS), (".", ".", ".", "?")


def build(splits: Sequence[tuple[str, int]], seed: int) -> list[VerifiablePrompt]:
    """So many different prompts of each split; none is in two."""
    draw = random.Random(seed)
    seen: set[str] = set()
    prompts: list[VerifiablePrompt] = []
    for split, count in splits:
        while sum(prompt.split == split for prompt in prompts) < count:
            made = [_instruction(draw) for _ in range(draw.randint(1, 3))]
            text = " ".join(said for said, _ in made)
            checks = tuple(check for _, check in made)
            different = len({check.kind for check in checks}) == len(checks)
            if text in seen or not different or obeying(checks, draw) is None:
                continue
            seen.add(text)
            number = f"small-{split}-{len(prompts):04d}"
            prompts.append(
                VerifiablePrompt(
                    prompt_id=number, split=split, topic=text, text=text, checks=checks
                )
            )
    return prompts


def _instruction(draw: random.Random) -> tuple[str, Check]:
    """Words of one instruction, and its check."""
    word, most, least = draw.choice(WORDS), draw.randint(4, 9), draw.randint(6, 12)
    count = draw.randint(1, 3)
    made: list[tuple[str, str, dict[str, Arg]]] = [
        (f"at most {most} words", "at_most_words", {"most": most}),
        (f"at least {least} words", "at_least_words", {"least": least}),
        (f"include {word}", "includes_word", {"word": word}),
        (f"avoid {word}", "avoids_word", {"word": word}),
        (f"first not {word}", "first_word_is_not", {"word": word}),
        ("no comma", "no_commas", {}),
        ("include number", "has_number", {}),
        ("question", "ends_with_question", {}),
        (f"count {count}", "sentence_count", {"count": count}),
    ]
    said, kind, args = draw.choice(made)
    return said, Check(kind=kind, args=args)


def learnt_text(prompt: VerifiablePrompt, draw: random.Random) -> str:
    """A text for the first training: obeying by design or as it comes."""
    if draw.random() < OBEYING:
        found = obeying(prompt.checks, draw)
        if found is not None:
            return found
    return random_text(draw)


def obeying(checks: Sequence[Check], draw: random.Random) -> str | None:
    """A random text that passes, the words that the checks name among it; None if none is found."""
    named = [str(check.args["word"]) for check in checks if "word" in check.args]
    for _ in range(_TRIES):
        text = random_text(draw, named)
        if all(passes(check, text, finished=True) for check in checks):
            return text
    return None


def random_text(draw: random.Random, named: Sequence[str] = ()) -> str:
    """One to three sentences of words, with a comma or a number here and there.

    None ends before its third word: where it may, the likeliest text is too short to pass anything.
    """
    tokens: list[str] = []
    for _ in range(draw.randint(1, 3)):
        for _ in range(draw.randint(3, 7)):
            tokens.append(draw.choice([*WORDS, *list(named) * 10]))
            if draw.random() < 0.2:
                tokens.append(draw.choice(_INSIDE))
        tokens.append(draw.choice(_ENDS))
    return " ".join(tokens)
