"""Completions put to prompts they do not answer; ``kto`` estimates from them how far the policy is.

Every group gets one, of another row, for the whole run: the choice depends on the rows alone, so
the reference cache covers it. It is packed behind the candidates, scored with them, never drawn and
never in a loss, so nothing goes back through it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

from mcpo.records import TokenizedGroup


def with_mismatched(
    groups: Sequence[TokenizedGroup], max_length: int | None
) -> tuple[TokenizedGroup, ...]:
    """Each group with a completion of the next one, in an order by the hash of their ids.

    Of the other group it is the chosen completion or one of its pool, each with half the weight, as
    a pair has it. It is cut where prompt and completion exceed ``max_length``.

    Raises:
        ValueError: there is one group, which has no other to take from.
    """
    if len(groups) < 2:
        raise ValueError(
            f"kto needs at least two rows, to put completions to prompts of others, got "
            f"{len(groups)}; give it more data"
        )
    order = sorted(range(len(groups)), key=lambda place: _number(groups[place], "order"))
    next_of = dict(zip(order, (*order[1:], order[0]), strict=True))
    return tuple(
        replace(group, mismatched_ids=_completion(groups[next_of[place]], group, max_length))
        for place, group in enumerate(groups)
    )


def _completion(
    other: TokenizedGroup, group: TokenizedGroup, max_length: int | None
) -> tuple[int, ...]:
    side, place = divmod(_number(other, "candidate"), 2)
    chosen, *pool = other.candidate_ids
    ids = pool[side % len(pool)] if place else chosen
    return ids if max_length is None else ids[: max_length - len(group.prompt_ids)]


def _number(group: TokenizedGroup, what: str) -> int:
    digest = hashlib.sha256(f"{what}/{group.row_id}".encode()).digest()
    return int.from_bytes(digest[:8], "little")
