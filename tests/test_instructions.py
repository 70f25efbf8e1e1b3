"""The table of instructions is complete and consistent."""

from __future__ import annotations

import inspect

import pytest

from mcpo.data import checkers
from mcpo.data.instructions import (
    KINDS,
    PAIRS,
    UNSEEN_KINDS,
    Check,
    passes,
    require_args,
    satisfies,
)
from mcpo.data.prompts import put_in_words


@pytest.mark.parametrize("name", KINDS)
def test_every_phrasing_takes_the_arguments_of_the_checker(name):
    kind = KINDS[name]
    assert len(kind.phrasings) >= 2
    for args in kind.choices:
        assert isinstance(kind.checker("some text", **args), bool)
        assert all("{" not in put_in_words(phrasing, args) for phrasing in kind.phrasings)


def test_every_checker_is_asked_for():
    offered = {kind.checker.__name__ for kind in KINDS.values()}
    written = {
        name
        for name, value in vars(checkers).items()
        if inspect.isfunction(value) and value.__annotations__.get("return") == "bool"
    }
    assert offered == written


def test_pairs_are_of_seen_kinds():
    assert {kind for pair in PAIRS for kind in pair} <= set(KINDS) - set(UNSEEN_KINDS)
    assert set(UNSEEN_KINDS) < set(KINDS)
    assert len(set(PAIRS)) == len(PAIRS)


@pytest.mark.parametrize(
    ("text", "finished", "expected"),
    [
        ("Cats sleep here.", True, True),
        ("Cats sleep here.", False, False),
        ("Cats sleep.", True, False),
        ("", True, False),
        ("! ! ! !", True, False),
        ("Cats, dogs and hens.", True, False),
    ],
)
def test_passes_asks_for_an_end_and_three_words(text, finished, expected):
    assert passes(Check(kind="no_commas", args={}), text, finished=finished) is expected


@pytest.mark.parametrize("name", KINDS)
def test_arguments_are_those_of_the_kind(name):
    for args in KINDS[name].choices:
        require_args(Check(kind=name, args=args))
        wrong = [{**args, "extra": 1}]
        for arg, value in args.items():
            wrong.append({key: other for key, other in args.items() if key != arg})
            wrong.append({**args, arg: str(value) if isinstance(value, int) else 3})
            wrong.append({**args, arg: True})
        for given in wrong:
            with pytest.raises(ValueError, match=f"args of {name} must be .*, no more and no less"):
                require_args(Check(kind=name, args=given))


def test_unknown_kind():
    with pytest.raises(ValueError, match=r"kind must be one of .*no_commas.*; got 'rhymes'"):
        satisfies(Check(kind="rhymes", args={}), "text")
