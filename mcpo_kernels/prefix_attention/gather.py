"""Keys and values as a varlen kernel wants them: those of the ancestors in front of each segment's.

A varlen kernel computes causal attention, aligned at the end, for sequences laid end to end whose
numbers of queries and keys differ. A segment with the keys of its ancestors in front of its own is
such a sequence, so one call serves a whole layout, windows included:

    layout    [ prompt ][ candidate 1 ][ candidate 2 ][ candidate 3 ]
    queries   [ prompt    candidate 1 ][ candidate 2 ][ candidate 3 ]                   as they lie
    keys      [ prompt    candidate 1 ][ prompt  candidate 2 ][ prompt  candidate 3 ]   gathered

The prompt and its first candidate are one ordinary sequence. Of a window only the keys that it
reaches are gathered.
"""
# T tokens, K gathered keys, S sequences, H query heads (of keys: key heads), D of queries and keys,
# E of values

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

import torch

from mcpo_kernels.prefix_attention.plan import make_plan
from mcpo_kernels.prefix_attention.scores import of_no_tokens, widen

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from mcpo_kernels.prefix_attention.layout import PrefixLayout
    from mcpo_kernels.prefix_attention.scores import ScoreRule

    Varlen = Callable[[Tensor, Tensor, Tensor, "Bounds", ScoreRule], Tensor]
    """[T, H, D], [K, H, D], [K, H, D] to [T, H, D]."""


class Bounds(NamedTuple):
    """Where the sequences of a varlen call begin and end."""

    queries: Tensor
    """[S + 1] int32 on the device."""
    keys: Tensor
    """[S + 1] int32 on the device."""
    most_queries: int
    most_keys: int


class Gather(NamedTuple):
    """How keys are gathered from parts of the pack, and the bounds that come of it."""

    part_lengths: tuple[int, ...]
    key_parts: tuple[int, ...]
    bounds: Bounds


# Made once for all layers of all micro-batches that are under way; models mix two windows at most.
@lru_cache(maxsize=8)
def make_gather(layout: PrefixLayout, window: int | None, device: torch.device) -> Gather:
    """The gather of a layout that has tokens; its bounds go to the device without a wait."""
    plan = make_plan(layout, window, None)
    pieces = sorted(
        (piece for group in plan.groups for piece in group), key=lambda piece: piece.queries.start
    )
    counts = [
        [sum(plan.part_lengths[part] for part in parts) for parts in of_pieces]
        for of_pieces in ([piece.queries for piece in pieces], [piece.keys for piece in pieces])
    ]
    on_host = [torch.tensor([0, *accumulate(each)], dtype=torch.int32) for each in counts]
    if device.type == "cuda":
        on_host = [bounds.pin_memory() for bounds in on_host]
    queries, keys = (bounds.to(device, non_blocking=True) for bounds in on_host)
    return Gather(
        plan.part_lengths,
        tuple(part for piece in pieces for part in piece.keys),
        Bounds(queries, keys, max(counts[0]), max(counts[1])),
    )


def attend(
    query_HTD: Tensor,
    key_HTD: Tensor,
    value_HTE: Tensor,
    layout: PrefixLayout,
    rule: ScoreRule,
    varlen: Varlen,
) -> Tensor:
    """[H, T, E] by one call of ``varlen``, whose queries, keys and values are equally wide."""
    num_values = value_HTE.shape[-1]
    if layout.num_tokens == 0:
        return of_no_tokens(query_HTD, key_HTD, value_HTE, rule)
    width = max(query_HTD.shape[-1], num_values)
    gather = make_gather(layout, rule.window, query_HTD.device)
    output_THD = varlen(
        widen(query_HTD, width).transpose(0, 1),
        _gathered(widen(key_HTD, width), gather),
        _gathered(widen(value_HTE, width), gather),
        gather.bounds,
        rule,
    )
    return output_THD[..., :num_values].transpose(0, 1)


def _gathered(tensor_HTD: Tensor, gather: Gather) -> Tensor:
    """[K, H, D], by concatenation: the backward adds up the copies of a part one after the other,
    where that of an index would add them by atomics, in any order."""
    parts = tensor_HTD.transpose(0, 1).split(gather.part_lengths)
    return torch.cat([parts[part] for part in gather.key_parts])
