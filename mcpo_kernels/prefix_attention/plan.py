"""From a layout to attention calls: which queries meet which keys, grouped by shape.

Every piece is ordinary causal attention aligned at the end: its keys are the ancestors' followed by
its own, so a sliding window is a matter of dropping keys at the front.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from mcpo_kernels.prefix_attention.layout import PrefixLayout

Span = tuple[int, int]
"""First token and the one after the last."""


class Piece(NamedTuple):
    """Consecutive queries and the keys they see, each as numbers of parts of the plan."""

    queries: range
    keys: tuple[int, ...]


class Plan(NamedTuple):
    """The packed tokens cut into parts, and the pieces made of them."""

    part_lengths: tuple[int, ...]
    groups: tuple[tuple[Piece, ...], ...]
    """Pieces of one group have equally many queries and equally many keys."""


# A model asks for the same plan in every layer; models mix two kinds of windows at most.
@lru_cache(maxsize=8)
def make_plan(layout: PrefixLayout, window: int | None, block: int | None) -> Plan:
    """The pieces of a layout.

    Args:
        layout: the segments.
        window: keys a query sees, itself included; None for all.
        block: queries of a piece at most; None for no limit.
    """
    pieces = [
        piece
        for chain, num_queries in _runs(layout)
        for piece in _cut(chain, num_queries, window, block)
    ]
    ends = {end for queries, keys in pieces for span in (queries, *keys) for end in span}
    borders = sorted({0, layout.num_tokens} | ends)
    number = {border: part for part, border in enumerate(borders)}

    groups: dict[tuple[int, int], list[Piece]] = {}
    for queries, keys in pieces:
        numbered = Piece(
            range(number[queries[0]], number[queries[1]]),
            tuple(part for start, stop in keys for part in range(number[start], number[stop])),
        )
        groups.setdefault((_size([queries]), _size(keys)), []).append(numbered)
    return Plan(
        tuple(stop - start for start, stop in pairwise(borders)),
        tuple(tuple(group) for group in groups.values()),
    )


def _runs(layout: PrefixLayout) -> list[tuple[list[Span], int]]:
    """Chains of keys with the number of tokens at their end that are queries.

    A segment that continues exactly what the previous run ends with, as the first candidate after
    its prompt does, is one causal sequence with it and joins that run.
    """
    own = list(zip(layout.starts, layout.lengths, strict=True))
    runs: list[tuple[list[Span], int]] = []
    for segment, (start, length) in enumerate(own):
        if length == 0:
            continue
        above = [own[ancestor] for ancestor in layout.ancestors(segment)]
        prefix = _merged([(first, first + tokens) for first, tokens in above])
        chain = _merged([*prefix, (start, start + length)])
        if runs and runs[-1][0] == prefix:
            length += runs.pop()[1]
        runs.append((chain, length))
    return runs


def _cut(
    chain: list[Span], num_queries: int, window: int | None, block: int | None
) -> list[tuple[Span, list[Span]]]:
    """The (queries, keys) of one run, each with the keys that any of its queries sees."""
    last_start, stop = chain[-1]
    pieces: list[tuple[Span, list[Span]]] = []
    for first in range(stop - num_queries, stop, block or num_queries):
        end = min(first + (block or num_queries), stop)
        keys = [*chain[:-1], (last_start, end)]
        if window is not None:
            keys = _last(keys, end - first + window - 1)
        pieces.append(((first, end), keys))
    return pieces


def _merged(spans: list[Span]) -> list[Span]:
    """The same tokens with empty spans dropped and adjacent ones joined."""
    merged: list[Span] = []
    for start, stop in spans:
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], stop)
        elif start < stop:
            merged.append((start, stop))
    return merged


def _last(spans: list[Span], count: int) -> list[Span]:
    """The last ``count`` tokens of the spans, or all if there are fewer."""
    kept: list[Span] = []
    for start, stop in reversed(spans):
        if count <= 0:
            break
        kept.insert(0, (max(start, stop - count), stop))
        count -= stop - start
    return kept


def _size(spans: list[Span]) -> int:
    return sum(stop - start for start, stop in spans)
