"""The torch ops: schema, fake kernel and autograd of the fused head and of the segment sum.

Values are checked here and not in the public functions: under torch.compile only the body of an
op sees them.
"""
# N scored tokens, S sequences

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import torch

from mcpo_kernels.impl import Impl
from mcpo_kernels.linear_logprob import chunked, cpu, validate
from mcpo_kernels.linear_logprob.head import (
    Allowance,
    Gradients,
    Head,
    Needs,
    Saved,
    Scores,
    accumulation_dtype,
    empty_kept,
)
from mcpo_kernels.linear_logprob.triton import entry as triton

if TYPE_CHECKING:
    from torch import Tensor

# Those that leave autograd to the ops of this file.
IMPLEMENTATIONS = {Impl.CHUNKED.value: chunked, Impl.CPU.value: cpu, Impl.TRITON.value: triton}


# The schema of an op is flat, so its arguments cannot be bundled.
@torch.library.custom_op("mcpo::linear_logprob", mutates_args=())
def linear_logprob(  # noqa: PLR0913
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float | None,
    scale: float,
    cache_mb: float,
    filter_mass: float,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The fields of ``Scores``; all but logp are for backward and not differentiable."""
    validate.check_targets(targets, weight.shape[0])
    head, allowance = Head(weight, bias, softcap, scale), Allowance(cache_mb, filter_mass)
    return IMPLEMENTATIONS[impl].forward(hidden, targets, head, allowance)


@torch.library.custom_op("mcpo::linear_logprob_backward", mutates_args=())
def linear_logprob_backward(  # noqa: PLR0913
    grad: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    logp: torch.Tensor,
    lse: torch.Tensor,
    logits: torch.Tensor,
    panel_lse: torch.Tensor,
    softcap: float | None,
    scale: float,
    filter_mass: float,
    needs: list[bool],
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dhidden, dweight, dbias), an empty tensor where ``needs`` is False."""
    head = Head(weight, bias, softcap, scale)
    saved = Saved(hidden, targets, Scores(logp, lse, logits, panel_lse))
    if weight.shape[0] > 0:
        gradients = IMPLEMENTATIONS[impl].backward(grad, saved, head, filter_mass, Needs(*needs))
    else:
        gradients = no_columns(hidden, head, Needs(*needs))
    dhidden, dweight, dbias = (hidden.new_empty(0) if g is None else g for g in gradients)
    return dhidden, dweight, dbias


def no_columns(hidden_ND: Tensor, head: Head, needs: Needs) -> Gradients:
    """Gradients of a slab of the vocabulary without columns, see ``vocab_parallel``."""
    return Gradients(
        hidden_ND.new_zeros(hidden_ND.shape) if needs.hidden else None,
        torch.empty_like(head.weight_VD) if needs.weight else None,
        None if head.bias_V is None or not needs.bias else torch.empty_like(head.bias_V),
    )


@torch.library.custom_op("mcpo::segment_sum", mutates_args=())
def segment_sum(values: torch.Tensor, seq_ids: torch.Tensor, num_seqs: int) -> torch.Tensor:
    """[S] sums of the values [N] of each sequence; 0 for one without any.

    Added up one after the other in float64 and rounded once, so neither the order nor the length
    costs precision; no atomics, so the same bits every time.
    """
    validate.check_seq_ids(seq_ids, num_seqs)
    borders = torch.arange(num_seqs + 1, device=seq_ids.device)
    offsets = torch.searchsorted(seq_ids, borders)
    # unsafe: the offsets are right by construction, and checking them would wait for the device.
    sums = torch.segment_reduce(
        values.double(), "sum", offsets=offsets, axis=0, initial=0, unsafe=True
    )
    return sums.to(values.dtype)


@linear_logprob.register_fake
def _(hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    cache_mb, filter_mass, impl = rest[-3:]
    num_tokens, dtype = hidden.shape[0], accumulation_dtype(hidden.dtype)
    panels = IMPLEMENTATIONS[impl].kept_panels(
        num_tokens, weight.shape[0], hidden.dtype, Allowance(cache_mb, filter_mass)
    )
    logp, lse = (hidden.new_empty(num_tokens, dtype=dtype) for _ in range(2))
    return logp, lse, *empty_kept(hidden, *panels)


@linear_logprob_backward.register_fake
def _(
    grad: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    needs = Needs(*rest[-2])
    return (
        hidden.new_empty(hidden.shape if needs.hidden else 0),
        weight.new_empty(weight.shape if needs.weight else 0),
        hidden.new_empty(bias.shape if needs.bias and bias is not None else 0),
    )


@segment_sum.register_fake
def _(values: Tensor, seq_ids: Tensor, num_seqs: int) -> Tensor:
    return values.new_empty(num_seqs)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, targets, bias, ctx.softcap, ctx.scale, _, ctx.filter_mass, ctx.impl = inputs
    ctx.mark_non_differentiable(*output[1:])
    # Otherwise backward is handed zeros in the place of gradients of those, as large as the cache.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, targets, bias, *output)


def _differentiate(ctx: Any, grad: Tensor | None, *_: object) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 9
    needs = [ctx.needs_input_grad[argument] for argument in (0, 1, 3)]
    gradients = linear_logprob_backward(
        grad, *ctx.saved_tensors, ctx.softcap, ctx.scale, ctx.filter_mass, needs, ctx.impl
    )
    dhidden, dweight, dbias = (
        g if need else None for g, need in zip(gradients, needs, strict=True)
    )
    return dhidden, dweight, None, dbias, *[None] * 5


def refuse_second_derivative(ctx: Any, *grads: Tensor) -> NoReturn:
    """The autograd rule of a backward."""
    raise RuntimeError(
        "linear_logprob can be differentiated once; use impl='reference' for second derivatives"
    )


def _save_seq_ids(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _spread(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    (seq_ids,) = ctx.saved_tensors
    return grad[seq_ids], None, None


linear_logprob.register_autograd(_differentiate, setup_context=_save)
linear_logprob_backward.register_autograd(refuse_second_derivative)
segment_sum.register_autograd(_spread, setup_context=_save_seq_ids)
