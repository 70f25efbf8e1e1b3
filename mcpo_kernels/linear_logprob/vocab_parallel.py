"""The fused head with its rows sharded over a group of ranks: vocabulary (tensor) parallelism.

Rank r holds a slab of V_r rows of the weight; hidden states and targets are the same on every
rank. With m_r the largest logit of the slab and s_r the sum of exp(z - m_r) over it,

    m = max_r m_r,    s = sum_r s_r exp(m_r - m),    logp = (z_target - m) - log s,

so three numbers of each row and rank are gathered, and every rank adds them up in the order of
ranks: the same operations on the same numbers give every rank the same bits, which the order
inside an all-reduce would leave to its library. The backward needs no more than logp and lse of
the whole vocabulary; it leaves each rank a part of dhidden, and the slab of dweight complete.

Each rank adds up a share of the rows of dhidden, over the ranks in their order and in the
accumulation dtype, and hands it to the others: an all-to-all and an all-gather, together the
traffic of a ring's all-reduce. Rows without gradient are not sent.

What runs on a slab is an implementation of ``head``; which one makes no difference here.
"""
# N scored tokens, M of them with gradient, D hidden, V vocabulary, R ranks, W rows of a share

from __future__ import annotations

import struct
import zlib
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from mcpo_kernels.linear_logprob import ops, validate
from mcpo_kernels.linear_logprob.agreement import check_same, digest, gather_row
from mcpo_kernels.linear_logprob.head import (
    Allowance,
    Head,
    Partial,
    accumulation_dtype,
    empty_kept,
    finish,
)

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup

SAME = ("hidden.shape[0]", "hidden.shape[1]", "the dtype", "softcap, scale or bias", "targets")
SAME_ADVICE = (
    "hidden and targets are whole on every rank and only weight and bias are sharded; ranks that "
    "train on other rows, as FSDP's do, call this without group inside the forward of the module "
    "that owns the weight"
)
GRADIENT_ADVICE = "every rank must differentiate the same loss of the same log-probabilities"


# The schema of an op is flat, so its arguments cannot be bundled.
@torch.library.custom_op("mcpo::vocab_parallel_logprob", mutates_args=())
def vocab_parallel_logprob(  # noqa: PLR0913
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float | None,
    scale: float,
    cache_mb: float,
    filter_mass: float,
    impl: str,
    group_name: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logp and lse of the whole vocabulary, targets as columns of the slab, what the slab keeps."""
    head, group = Head(weight, bias, softcap, scale), resolve_group(group_name)
    size_R = agree(hidden, targets, head, group)
    end_R = size_R.cumsum(0)
    check_targets(targets, end_R[-1])
    place_N = targets - (end_R[group.rank()] - weight.shape[0])
    allowance = Allowance(cache_mb, filter_mass)
    if weight.shape[0] > 0:
        partial = ops.IMPLEMENTATIONS[impl].partial(hidden, place_N, head, allowance)
    else:
        partial = empty_slab(hidden)
    owner_N = torch.searchsorted(end_R, targets.contiguous(), right=True)
    return *merge(partial, owner_N, group), place_N, partial.logits_PNC, partial.panel_lse_NQ


@torch.library.custom_op("mcpo::sum_over_group", mutates_args=())
def sum_over_group(part: torch.Tensor, grad: torch.Tensor, group_name: str) -> torch.Tensor:
    """[N, D] the sum of every rank's part; rows whose upstream gradient is 0 are 0."""
    group = resolve_group(group_name)
    kept_M = grad.nonzero().squeeze(1)
    table_RK = gather_row([len(kept_M)], [digest(kept_M)], group)
    names = ("the number of rows with gradient", "the rows with gradient")
    check_same(table_RK, names, GRADIENT_ADVICE)
    num_ranks, height = group.size(), -(-len(kept_M) // group.size())
    sent = part.new_zeros(num_ranks * height, part.shape[1])
    sent[: len(kept_M)] = part[kept_M]
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    part_RWD = received.view(num_ranks, height, part.shape[1])
    total_WD = part_RWD[0].to(accumulation_dtype(part.dtype))
    for rank in range(1, num_ranks):
        total_WD = total_WD + part_RWD[rank]
    dist.all_gather_single(received, total_WD.to(part.dtype), group=group)
    total_ND = part.new_zeros(part.shape)
    total_ND[kept_M] = received[: len(kept_M)]
    return total_ND


def resolve_group(group_name: str) -> ProcessGroup:
    """The group of a name, which is what an op can be given."""
    # Where torch's own collectives with group names look; not for import where torch has none.
    return dist.distributed_c10d._resolve_process_group(group_name)  # pyright: ignore


def agree(hidden_ND: Tensor, target_N: Tensor, head: Head, group: ProcessGroup) -> Tensor:
    """[R] rows of every rank's slab.

    Raises:
        ValueError: the ranks differ in what must be the same, or hold the same slab.
    """
    options = struct.pack("dd?", head.softcap or 0.0, head.scale, head.bias_V is not None)
    num_slab = head.weight_VD.shape[0]
    dtype = validate.FLOAT_DTYPES.index(hidden_ND.dtype)
    # Not all of the slab is read: a few rows tell two slabs apart.
    sample = (
        [head.weight_VD[row] for row in (0, num_slab // 2, -1)] if num_slab else [hidden_ND[:0]]
    )
    numbers = [num_slab, *hidden_ND.shape, dtype, zlib.crc32(options)]
    digests = [digest(target_N), digest(torch.cat(sample))]
    table_RK = gather_row(numbers, digests, group)
    check_same(table_RK[:, 1:-1], SAME, SAME_ADVICE)
    size_R, digest_R = table_RK[:, 0], table_RK[:, -1]
    validate.check_slabs(size_R, digest_R)
    return size_R


def check_targets(target_N: Tensor, num_vocab: Tensor) -> None:
    """Raise unless every target is a column of some slab; all ranks raise or none does."""
    on_cpu = target_N.device.type == "cpu"
    validate.check_targets(target_N, int(num_vocab) if on_cpu else num_vocab)


def empty_slab(hidden_ND: Tensor) -> Partial:
    """What no columns say."""
    num_tokens, dtype = hidden_ND.shape[0], accumulation_dtype(hidden_ND.dtype)
    zero_N = hidden_ND.new_zeros(num_tokens, dtype=dtype)
    return Partial(torch.full_like(zero_N, -torch.inf), zero_N, zero_N, *empty_kept(hidden_ND))


def merge(partial: Partial, owner_N: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """Logp and lse of the whole vocabulary; ``owner_N`` is the rank that holds the target."""
    own_3N = torch.stack(partial[:3])
    every_R3N = own_3N.new_empty(group.size(), *own_3N.shape)
    dist.all_gather_single(every_R3N.flatten(), own_3N.flatten(), group=group)
    max_N = every_R3N[:, 0].amax(0)
    # As in the implementations: where all is -inf there is nothing finite to shift by.
    shift_N = max_N.masked_fill(max_N == -torch.inf, 0.0)
    sum_N = torch.zeros_like(max_N)
    for max_r_N, sum_r_N, _ in every_R3N:
        sum_N = sum_N + sum_r_N * (max_r_N - shift_N).exp()
    target_logit_N = every_R3N[:, 2].gather(0, owner_N[None]).squeeze(0)
    return finish(max_N, sum_N, target_logit_N)


@vocab_parallel_logprob.register_fake
def _(
    hidden: Tensor, weight: Tensor, targets: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    cache_mb, filter_mass, impl, _ = rest[-4:]
    num_tokens, dtype = hidden.shape[0], accumulation_dtype(hidden.dtype)
    allowance = Allowance(cache_mb, filter_mass)
    kept_panels = ops.IMPLEMENTATIONS[impl].kept_panels
    panels = kept_panels(num_tokens, weight.shape[0], hidden.dtype, allowance)
    logp, lse = (hidden.new_empty(num_tokens, dtype=dtype) for _ in range(2))
    return logp, lse, targets.new_empty(num_tokens), *empty_kept(hidden, *panels)


@sum_over_group.register_fake
def _(part: Tensor, grad: Tensor, group_name: str) -> Tensor:
    return part.new_empty(part.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, _, bias, *options = inputs
    ctx.softcap, ctx.scale, _, ctx.filter_mass, ctx.impl, ctx.group_name = options
    logp, lse, place, *kept = output
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, place, bias, logp, lse, *kept)


def _differentiate(ctx: Any, grad: Tensor | None, *_: object) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 10
    needs = [ctx.needs_input_grad[argument] for argument in (0, 1, 3)]
    options = (ctx.softcap, ctx.scale, ctx.filter_mass, needs, ctx.impl)
    gradients = ops.linear_logprob_backward(grad, *ctx.saved_tensors, *options)
    dhidden, dweight, dbias = (
        g if need else None for g, need in zip(gradients, needs, strict=True)
    )
    if dhidden is not None:
        dhidden = sum_over_group(dhidden, grad, ctx.group_name)
    return dhidden, dweight, None, dbias, *(None,) * 6


vocab_parallel_logprob.register_autograd(_differentiate, setup_context=_save)
sum_over_group.register_autograd(ops.refuse_second_derivative)
