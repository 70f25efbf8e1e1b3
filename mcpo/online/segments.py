"""Where segments begin and end, and which prompts each of them asks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TypeVar

from mcpo.loop import Segment
from mcpo.order import epoch_order

T = TypeVar("T")


def cut_into_segments(total_steps: int, count: int) -> list[Segment]:
    """Parts of a run that differ by at most one step."""
    borders = [total_steps * number // count for number in range(count + 1)]
    return [
        Segment(number=number, start=start, stop=stop)
        for number, (start, stop) in enumerate(pairwise(borders))
    ]


def prompts_of(
    prompts: Sequence[T], segment: Segment, *, groups_per_step: int, seed: int, limit: int | None
) -> list[T]:
    """As many prompts as the segment has groups, going on where the one before it ended.

    Prompts are met in epochs, each in an order of its own, and none twice in one segment.

    Args:
        prompts: of the run.
        segment: which part of it.
        groups_per_step: over all ranks.
        seed: of the run.
        limit: as many at most.
    """
    count = (segment.stop - segment.start) * groups_per_step
    begin = segment.start * groups_per_step
    if limit is not None:
        count, begin = min(count, limit), segment.number * min(count, limit)
    chosen: dict[int, None] = {}
    for place in range(begin, begin + count):
        epoch, number = divmod(place, len(prompts))
        chosen[int(epoch_order(len(prompts), seed, epoch)[number])] = None
    return [prompts[number] for number in chosen]
