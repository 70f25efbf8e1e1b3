"""Tensors of the pack, cut into the pieces of a plan and stacked by shape."""
# B pieces of a group, L queries and K keys of a piece, H query heads, D of queries and keys,
# E of values

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable

    from torch import Tensor

    from mcpo_kernels.prefix_attention.plan import Plan

# Of a window: at least so many queries share the keys that a block of them sees.
MIN_WINDOW_BLOCK = 128


def window_block(window: int | None) -> int | None:
    """Queries of a piece at most."""
    return None if window is None else max(window, MIN_WINDOW_BLOCK)


def stacked(
    query_HTD: Tensor, key_HTD: Tensor, value_HTE: Tensor, plan: Plan
) -> Generator[tuple[list[int], tuple[Tensor, Tensor, Tensor]]]:
    """Of each group the first parts of its pieces, and what a call of attention takes.

    Split once and gathered by concatenation: the backward of either costs what is copied, that of a
    slice or an index costs a whole [H, T, D], and an index adds up in any order on CUDA.
    """
    queries = query_HTD.split(plan.part_lengths, dim=1)
    keys = key_HTD.split(plan.part_lengths, dim=1)
    values = value_HTE.split(plan.part_lengths, dim=1)
    for group in plan.groups:
        tensors = (
            torch.stack([join(queries, piece.queries, dim=1) for piece in group]),
            torch.stack([join(keys, piece.keys, dim=1) for piece in group]),
            torch.stack([join(values, piece.keys, dim=1) for piece in group]),
        )
        yield [piece.queries.start for piece in group], tensors


def join(parts: tuple[Tensor, ...], numbers: Iterable[int], dim: int) -> Tensor:
    """Some parts, one after the other."""
    chosen = [parts[number] for number in numbers]
    return chosen[0] if len(chosen) == 1 else torch.cat(chosen, dim=dim)


def end_aligned_mask(query_BHLD: Tensor, key_BHKD: Tensor, window: int | None) -> Tensor | None:
    """[L, K] bool, the last query at the last key; None where it is the plain causal square."""
    num_queries, num_keys = query_BHLD.shape[2], key_BHKD.shape[2]
    if num_queries == num_keys and (window is None or window >= num_keys):
        return None
    mask_LK = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query_BHLD.device)
    mask_LK = mask_LK.tril(num_keys - num_queries)
    return mask_LK if window is None else mask_LK.triu(num_keys - num_queries - window + 1)
