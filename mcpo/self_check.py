"""Two questions before the first update: is packing exact for this model, is the reference the
policy?

A model whose layers do not go through transformers' attention interface (linear attention,
state-space hybrids, old code) is silently wrong in a packed sequence. A reference cache of other
weights or another precision silently moves the optimum. Both show at once as log-probabilities
that differ by more than rounding, and what rounding does is measured, not guessed
(docs/numerics.md, "The start-up checks").
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from mcpo.config import LossConfig
from mcpo.losses import mcpo
from mcpo.pack import move, pack
from mcpo.policy import Policy, group_logps, unpacked
from mcpo.records import PackedBatch, ScoredBatch, TokenizedGroup
from mcpo.reference import Reference
from mcpo.widened import Widened
from mcpo_kernels.integrations.packable import longest_span

# A float32 log-probability passes some hundred roundings, each at most half a unit in the last
# place of values as large as the sum itself; 64 units is their root-mean-square sum with a factor
# of ten to spare.
FLOAT32_UNITS = 64
# A normal error exceeds four root-mean-squares in one of 16,000 cases.
TAIL = 4
# What the packing check costs: 4 groups of at most 4 candidates give the 16 errors that the mean
# square is taken over; 4096 tokens in plain forwards take about as long as a step of training.
CHECKED_GROUPS, CANDIDATES_PER_GROUP, TOKENS_PER_GROUP = 4, 4, 1024
# A slab of float64 logits is 64 MiB at a vocabulary of 131,072.
ROWS_PER_SLAB = 64


@torch.no_grad()
def check_packing(policy: Policy, groups: Sequence[TokenizedGroup], *, share_prefix: bool) -> float:
    """Compare packed groups with the model's own plain forwards.

    Args:
        policy: in evaluation or training mode; its dropout is off.
        groups: of which the telling ones are taken, see ``telling_groups``.
        share_prefix: as in training.

    Returns:
        The rounding error of this model in this precision: root mean square, in nats per root of
        a completion token.

    Raises:
        ValueError: a packed error is larger than rounding; or there are no groups.
    """
    chosen = telling_groups(groups, longest_span(policy.model))
    batch = move(pack(chosen, share_prefix=share_prefix), next(policy.parameters()).device)
    packed_S = policy(batch).double()
    exact = [logp for group in chosen for logp in plain_logps(policy, group, autocast_dtype=None)]
    naive = exact
    if policy.autocast_dtype is not None:
        dtype = policy.autocast_dtype
        naive = [logp for g in chosen for logp in plain_logps(policy, g, autocast_dtype=dtype)]
    exact_S = torch.stack([logp_L.sum() for logp_L in exact])
    length_S = torch.tensor([len(logp_L) for logp_L in exact], device=exact_S.device)
    rounding = _rounding(naive, exact)
    budget_S = 2 * TAIL * rounding * length_S.sqrt() + float32_band(exact_S, length_S)
    error_S = (packed_S - exact_S).abs()
    if not bool((error_S <= budget_S).all()):
        worst = int((error_S - budget_S).argmax())
        row_ids = [group.row_id for group in chosen for _ in group.candidate_ids]
        raise ValueError(
            f"{type(policy.model).__name__} must give the same log-probabilities packed and alone; "
            f"row {row_ids[worst]!r}, a candidate of {int(length_S[worst])} tokens: "
            f"{packed_S[worst]:.4f} packed, {exact_S[worst]:.4f} alone, {budget_S[worst]:.4f} "
            f"allowed for rounding. {_suspects(policy)}"
        )
    return max(rounding, _root_mean_square(error_S / length_S.sqrt()))


def telling_groups(groups: Sequence[TokenizedGroup], span: int = 0) -> list[TokenizedGroup]:
    """The groups with the most completion tokens, each cut down to its longest candidates.

    A candidate of one token is no input at all and shows nothing. At most ``CHECKED_GROUPS`` of
    those that fit ``TOKENS_PER_GROUP``; where none does, the one with the fewest tokens. Where none
    of them reaches beyond ``span`` tokens, the cheapest that does is added, if there is one.
    """
    trimmed = [_longest_candidates(group) for group in groups]
    affordable = [group for group in trimmed if _plain_tokens(group) <= TOKENS_PER_GROUP]
    chosen = sorted(affordable, key=_completion_tokens, reverse=True)[:CHECKED_GROUPS]
    chosen = chosen or sorted(trimmed, key=_plain_tokens)[:1]
    if not any(_longest_sequence(group) > span for group in chosen):
        beyond = [group for group in trimmed if _longest_sequence(group) > span]
        chosen += sorted(beyond, key=_plain_tokens)[:1]
    return chosen


def float32_band(logp: Tensor, length: Tensor) -> Tensor:
    """How far two float32 computations of a sequence's log-probability may lie apart, in nats."""
    return FLOAT32_UNITS * torch.finfo(torch.float32).eps * (logp.abs() + length.sqrt())


@torch.no_grad()
def plain_logps(
    policy: Policy, group: TokenizedGroup, *, autocast_dtype: torch.dtype | None
) -> list[Tensor]:
    """Of each candidate its tokens' log-probabilities, float64, in a plain forward of its own.

    Attention, head and logit scaling are the model's.
    """
    device = next(policy.parameters()).device
    with (
        unpacked(policy) as model,
        torch.autocast(device.type, dtype=autocast_dtype, enabled=autocast_dtype is not None),
        nullcontext() if autocast_dtype else Widened(),
    ):
        # Where a model offers it, the prompt's rows do not go through the head.
        trims = "logits_to_keep" in inspect.signature(model.forward).parameters
        logps: list[Tensor] = []
        for ids in group.candidate_ids:
            token_T = torch.tensor([*group.prompt_ids, *ids], device=device)
            kept = {"logits_to_keep": len(ids) + 1} if trims else {}
            logit_LV = model(input_ids=token_T[None], use_cache=False, **kept).logits[0, :-1]
            logps.append(_target_logps(logit_LV[-len(ids) :], token_T[-len(ids) :]))
        return logps


def _target_logps(logit_LV: Tensor, target_L: Tensor) -> Tensor:
    """[L] float64, a slab of rows at a time."""
    slabs = zip(logit_LV.split(ROWS_PER_SLAB), target_L.split(ROWS_PER_SLAB), strict=True)
    return torch.cat(
        [
            logit_RV.double().log_softmax(dim=-1).gather(1, target_R[:, None]).squeeze(1)
            for logit_RV, target_R in slabs
        ]
    )


@torch.no_grad()
def check_reference(
    policy: Policy,
    batches: Sequence[PackedBatch],
    references: Reference,
    *,
    beta: float,
    rounding: float,
    num_negatives: int = 1,
    loss: Callable[[ScoredBatch], Tensor] | None = None,
) -> float:
    """Before any update the policy is the reference: log-ratios are 0, the loss is log(1 + M).

    Args:
        policy: as it starts.
        batches: packed as in training, on the policy's device.
        references: from the cache, or live.
        beta: of the loss.
        rounding: what ``check_packing`` returned.
        num_negatives: M, how many negatives the loss contrasts at once with the chosen completion;
            1 for a mean over pairs.
        loss: the [P] losses of a batch; the listwise one if None.

    Returns:
        The largest log-ratio, in nats.

    Raises:
        ValueError: a log-ratio or loss is further off; the message says where to look.
    """
    logps = [group_logps(policy(batch), batch) for batch in batches]
    ratios = [
        (logp_PC - references.of(batch)).abs()
        for logp_PC, batch in zip(logps, batches, strict=True)
    ]
    # Two computations, each with its own error.
    bands = [
        2 * TAIL * rounding * batch.length_PC.sqrt() + float32_band(logp_PC, batch.length_PC)
        for logp_PC, batch in zip(logps, batches, strict=True)
    ]
    if not all(bool((r <= band).all()) for r, band in zip(ratios, bands, strict=True)):
        cause = _cause(policy, batches, references, ratios, bands)
        raise ValueError(f"{_worst_row(batches, ratios, bands, beta)} {cause}")
    for batch, logp_PC, band_PC in zip(batches, logps, bands, strict=True):
        scored = _with_first_negatives(batch, logp_PC, references.of(batch), num_negatives)
        loss_P = mcpo(scored, LossConfig(beta=beta)) if loss is None else loss(scored)
        _check_loss(loss_P, scored, batch.row_ids, 2 * beta * band_PC.max(dim=1).values)
    return max(float(ratio_PC.max()) for ratio_PC in ratios)


def _worst_row(
    batches: Sequence[PackedBatch], ratios: Sequence[Tensor], bands: Sequence[Tensor], beta: float
) -> str:
    """What is off, and by how much."""
    row_ids = [row_id for batch in batches for row_id in batch.row_ids]
    excess_P = torch.cat(
        [(ratio - band).max(dim=1).values for ratio, band in zip(ratios, bands, strict=True)]
    )
    worst = int(excess_P.argmax())
    got = float(torch.cat([ratio_PC.max(dim=1).values for ratio_PC in ratios])[worst])
    allowed = float(torch.cat([band_PC.max(dim=1).values for band_PC in bands])[worst])
    return (
        "before the first step every log-ratio to the reference must be 0; row "
        f"{row_ids[worst]!r} is off by {got:.3f} nats ({beta * got:.3f} in reward), {allowed:.3f} "
        "allowed for rounding."
    )


def _cause(
    policy: Policy,
    batches: Sequence[PackedBatch],
    references: Reference,
    ratios: Sequence[Tensor],
    bands: Sequence[Tensor],
) -> str:
    """By elimination, as far as numbers can tell."""
    other = torch.bfloat16 if policy.autocast_dtype is None else None
    with _autocast(policy, other):
        there = [
            (group_logps(policy(batch), batch) - references.of(batch)).abs() for batch in batches
        ]
    verified = "Tokens, template and truncation were verified by hash"
    # Errors of one precision have most of their roundings in common, those of two have none.
    if 2 * _root_mean_square(_flat(there)) < _root_mean_square(_flat(ratios)):
        return (
            f"{verified}, and in {other or torch.float32} this model comes nearer: the reference "
            "was computed in that precision; delete its cache or run in it"
        )
    agrees_P = torch.cat([(r <= band).all(dim=1) for r, band in zip(ratios, bands, strict=True)])
    if bool(agrees_P.any()):
        return (
            f"{verified}, and {int(agrees_P.sum())} of {len(agrees_P)} rows agree, so it is not "
            "the weights: the cache holds wrong values for the others; delete it"
        )
    return (
        f"{verified}, no precision comes nearer and none of {len(agrees_P)} rows agrees: the "
        "reference was computed with other weights; delete its cache"
    )


@contextmanager
def _autocast(policy: Policy, dtype: torch.dtype | None) -> Generator[None]:
    """The policy in another precision."""
    own = policy.autocast_dtype
    policy.autocast_dtype = dtype
    try:
        with nullcontext() if dtype else Widened():
            yield
    finally:
        policy.autocast_dtype = own


def _with_first_negatives(
    batch: PackedBatch, logp_PC: Tensor, ref_logp_PC: Tensor, num_negatives: int
) -> ScoredBatch:
    """What a loss sees when the first negatives of each pool are drawn: now all are alike."""
    width = min(num_negatives, batch.mask_PC.shape[1] - 1)
    column_M = torch.arange(1, width + 1, device=batch.mask_PC.device)
    return ScoredBatch(
        logp_PC=logp_PC,
        ref_logp_PC=ref_logp_PC,
        length_PC=batch.length_PC,
        mask_PC=batch.mask_PC,
        negative_PM=column_M.expand(batch.num_prompts, width),
        negative_mask_PM=batch.mask_PC[:, 1 : width + 1],
    )


def _check_loss(
    loss_P: Tensor, scored: ScoredBatch, row_ids: Sequence[str], slope_band_P: Tensor
) -> None:
    num_P = scored.negative_mask_PM.sum(dim=1)
    wanted_P = num_P.double().log1p()
    # Each of 1 + M terms is rounded once, and so are reward, sum and logarithm.
    eps = torch.finfo(torch.float32).eps
    band_P = slope_band_P + (num_P + 4) * eps * (1 + wanted_P)
    error_P = (loss_P - wanted_P).abs()
    if not bool((error_P <= band_P).all()):
        worst = int((error_P - band_P).argmax())
        raise ValueError(
            f"before the first step the loss must be log(1 + M); row {row_ids[worst]!r} with M = "
            f"{int(num_P[worst])} must have {float(wanted_P[worst]):.4f}, got "
            f"{float(loss_P[worst]):.4f}. The log-ratios are 0, so it is the loss function: a mean "
            "over pairs is to be checked with num_negatives=1"
        )


def _rounding(naive: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Root mean square error of a sum of tokens, per root of a token.

    Sums of errors can cancel by chance and few sums say little; errors of single tokens are many,
    but do not show what they have in common. The larger of the two holds.
    """
    errors = [naive_L - exact_L for naive_L, exact_L in zip(naive, exact, strict=True)]
    of_sums = torch.stack([error_L.sum() / len(error_L) ** 0.5 for error_L in errors])
    return max(_root_mean_square(of_sums), _root_mean_square(torch.cat(errors)))


def _root_mean_square(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _longest_candidates(group: TokenizedGroup) -> TokenizedGroup:
    """Two candidates, and as many more as fit."""
    kept: list[tuple[int, ...]] = []
    used = 0
    for ids in sorted(group.candidate_ids, key=len, reverse=True)[:CANDIDATES_PER_GROUP]:
        used += len(group.prompt_ids) + len(ids)
        if len(kept) >= 2 and used > TOKENS_PER_GROUP:
            break
        kept.append(ids)
    return replace(group, candidate_ids=tuple(kept), scores=(), columns=(), mismatched_ids=None)


def _plain_tokens(group: TokenizedGroup) -> int:
    """Of the forwards that score each candidate by itself."""
    return group.num_candidates * len(group.prompt_ids) + _completion_tokens(group)


def _longest_sequence(group: TokenizedGroup) -> int:
    return len(group.prompt_ids) + max(len(ids) for ids in group.candidate_ids)


def _suspects(policy: Policy) -> str:
    """What can be wrong in this way of batching."""
    if policy.packs:
        return (
            "Its layers do not follow the packed layout (linear attention or its own attention "
            "code), or its logits are more than a projection of its hidden states: use another "
            "model, or prefix_sharing: auto"
        )
    return (
        "Its logits are more than a projection of its hidden states, or padding on the right "
        "changes them: use another model"
    )


def _completion_tokens(group: TokenizedGroup) -> int:
    return sum(len(ids) for ids in group.candidate_ids)
