"""Two questions before the first update: is packing exact for this model, is the reference the
policy?

A model whose layers do not go through transformers' attention interface (linear attention,
state-space hybrids, old code) is silently wrong in a packed sequence. A reference cache of another
template, truncation or precision silently moves the optimum. Both show at once as log-probabilities
that differ by more than rounding, and what rounding does is measured, not guessed
(docs/numerics.md, "The start-up checks").
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mcpo.pack import move, pack
from mcpo.policy import Policy, group_logps, unpacked
from mcpo.records import PackedBatch, TokenizedGroup
from mcpo.reference_cache import ReferenceLogps

# A float32 log-probability passes some hundred roundings, each at most half a unit in the last
# place of values as large as the sum itself; 64 units is their root-mean-square sum with a factor
# of ten to spare.
FLOAT32_UNITS = 64
# The largest of thousands of roundings is beyond the largest of the few that were measured: errors
# that are normal to a good approximation stay below four times the largest of half a dozen.
TAIL = 4


@torch.no_grad()
def check_packing(policy: Policy, group: TokenizedGroup, *, share_prefix: bool) -> float:
    """Compare one packed group with the model's own plain forwards.

    Returns:
        The rounding error of the packed computation, in nats per root of a completion token.

    Raises:
        ValueError: the packed error is more than twice that of plain forwards in the same
            precision.
    """
    device = next(policy.parameters()).device
    batch = move(pack([group], share_prefix=share_prefix), device)
    packed_C = group_logps(policy(batch), batch)[0].double()
    exact_C = plain_logps(policy, group, autocast_dtype=None)
    naive_C = plain_logps(policy, group, autocast_dtype=policy.autocast_dtype)
    length_C = batch.length_PC[0]
    band_C = float32_band(exact_C, length_C)
    budget_C = 2 * (naive_C - exact_C).abs().max() + band_C
    error_C = (packed_C - exact_C).abs()
    if not bool((error_C <= budget_C).all()):
        worst = int((error_C - budget_C).argmax())
        raise ValueError(
            f"{type(policy.model).__name__} must give the same log-probabilities packed and alone; "
            f"row {group.row_id!r}, candidate {worst}: {packed_C[worst]:.4f} packed, "
            f"{exact_C[worst]:.4f} alone, {budget_C[worst]:.4f} allowed for rounding. Its layers "
            "do not follow the packed layout (linear attention or its own attention code): "
            "use another model"
        )
    return float((torch.maximum(error_C, band_C) / length_C.sqrt()).max())


def float32_band(logp: Tensor, length: Tensor) -> Tensor:
    """How far two float32 computations of a sequence's log-probability may lie apart, in nats."""
    return FLOAT32_UNITS * torch.finfo(torch.float32).eps * (logp.abs() + length.sqrt())


def plain_logps(
    policy: Policy, group: TokenizedGroup, *, autocast_dtype: torch.dtype | None
) -> Tensor:
    """[C] float64, each candidate in a plain forward of its own, head and attention the model's."""
    device = next(policy.parameters()).device
    logps: list[Tensor] = []
    with (
        unpacked(policy) as model,
        torch.autocast(device.type, dtype=autocast_dtype, enabled=autocast_dtype is not None),
    ):
        for candidate_ids in group.candidate_ids:
            token_T = torch.tensor([*group.prompt_ids, *candidate_ids], device=device)
            logit_TV = model(input_ids=token_T[None], use_cache=False).logits[0]
            logp_TV = logit_TV[len(group.prompt_ids) - 1 : -1].double().log_softmax(dim=-1)
            logps.append(logp_TV.gather(1, token_T[len(group.prompt_ids) :, None]).sum())
    return torch.stack(logps)


def check_reference(
    policy: Policy,
    batches: Sequence[PackedBatch],
    references: ReferenceLogps,
    *,
    beta: float,
    rounding: float,
) -> float:
    """Before any update the policy is the reference: every log-ratio is 0 but for rounding.

    Args:
        policy: as it starts.
        batches: packed as in training, on the policy's device.
        references: from the cache.
        beta: of the loss, for the message.
        rounding: what ``check_packing`` returned.

    Returns:
        The largest log-ratio, in nats.

    Raises:
        ValueError: a log-ratio is larger; the message says what to look at.
    """
    largest = 0.0
    for batch in batches:
        with torch.no_grad():
            logp_PC = group_logps(policy(batch), batch)
        ratio_PC = (logp_PC - references.of(batch)).abs()
        # Two computations, each with its own error.
        band_PC = 2 * TAIL * rounding * batch.length_PC.sqrt()
        if not bool((ratio_PC <= band_PC).all()):
            prompt = int((ratio_PC - band_PC).max(dim=1).values.argmax())
            got = float(ratio_PC[prompt].max())
            raise ValueError(
                f"before the first step every log-ratio to the reference must be 0 and the loss "
                f"log(1 + M) = {math.log(2):.3f} for one negative; row "
                f"{batch.row_ids[prompt]!r} is off by {got:.3f} nats ({beta * got:.3f} in reward), "
                f"{float(band_PC[prompt].max()):.3f} allowed for rounding. Tokens, template and "
                "truncation were verified by hash, so the reference was computed with other "
                "weights or another precision: delete its cache"
            )
        largest = max(largest, float(ratio_PC.max()))
    return largest
