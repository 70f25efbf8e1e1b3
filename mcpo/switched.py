"""The noise candidate of the paper: a completion with two of its tokens switched at random."""

from __future__ import annotations

from collections import Counter
from itertools import accumulate

from mcpo.streams import raw_numbers


def with_two_switched(ids: tuple[int, ...], name: str) -> tuple[int, ...] | None:
    """The ids with two unequal ones in each other's place; None where all are equal.

    Every pair of places with unequal ids is as likely, drawn from the stream called ``name``.
    """
    occurrences = Counter(ids)
    # Of each place, how many others hold another id.
    ends = list(accumulate(len(ids) - occurrences[token] for token in ids))
    if not ends or ends[-1] == 0:
        return None
    # The remainder of 64 bits favours no place by more than ends[-1] / 2^64.
    number = int(raw_numbers(name, 1)[0]) % ends[-1]
    first = next(place for place, end in enumerate(ends) if number < end)
    partners = [place for place, token in enumerate(ids) if token != ids[first]]
    second = partners[number - (ends[first] - len(partners))]
    switched = list(ids)
    switched[first], switched[second] = ids[second], ids[first]
    return tuple(switched)
