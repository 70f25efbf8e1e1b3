"""Hidden states of unshared sequences by plain forwards: for models that cannot be packed.

Every sequence is a row of its own and the model's attention is its own. Sequences of similar length
share a forward, padded on the right: in a causal model no token sees what comes after it, so the
padding changes nothing, and no mask tells of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mcpo_kernels.prefix_attention.layout import NO_PARENT, PrefixLayout

# Of the tokens of a forward at most one in so many is padding.
PADDED_SHARE = 4


def plain_hidden(body: nn.Module, token_T: Tensor, layout: PrefixLayout) -> Tensor:
    """[T, D] final hidden states of every token, in the order of the pack.

    Raises:
        ValueError: a sequence shares its prefix with others.
    """
    if any(parent != NO_PARENT for parent in layout.parents):
        raise ValueError(
            "plain forwards need sequences that stand alone, and this batch shares prefixes; pack "
            "it with share_prefix=False"
        )
    sequences = token_T.split(layout.lengths)
    hidden_of: dict[int, Tensor] = {}
    for members in similar_lengths(layout.lengths):
        rows = [sequences[member] for member in members]
        # Padded with a real token: some models read their padding token as an instruction.
        row_BL = torch.stack([_extended(row_L, len(rows[0])) for row_L in rows])
        hidden_BLD = body(input_ids=row_BL, use_cache=False).last_hidden_state
        for member, row_L, hidden_LD in zip(members, rows, hidden_BLD.unbind(0), strict=True):
            hidden_of[member] = hidden_LD[: len(row_L)]
    return torch.cat([hidden_of[member] for member in sorted(hidden_of)])


def similar_lengths(lengths: Sequence[int]) -> list[list[int]]:
    """Indices of sequences that share a forward, the longest first; empty ones are left out."""
    forwards: list[list[int]] = []
    real = 0
    for member in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if lengths[member] == 0:
            continue
        real += lengths[member]
        if forwards:
            padded = lengths[forwards[-1][0]] * (len(forwards[-1]) + 1)
            if PADDED_SHARE * (padded - real) <= padded:
                forwards[-1].append(member)
                continue
        forwards.append([member])
        real = lengths[member]
    return forwards


def _extended(row_L: Tensor, length: int) -> Tensor:
    return torch.cat([row_L, row_L[-1:].expand(length - len(row_L))])
