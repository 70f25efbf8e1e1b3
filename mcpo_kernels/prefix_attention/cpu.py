"""torch's attention kernel for CPUs by its own name, which also gives the log-sum-exps.

They are what its backward needs besides inputs and output. So a layer that runs a second time, for
its gradient alone, need not attend again: a ``TorchFunctionMode`` sees ``attend`` as one call, and
may answer it by ``attend_again``.
"""
# B pieces of a group, L queries and K keys of a piece, H query heads, D of queries and keys,
# E of values

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.overrides import handle_torch_function, has_torch_function

from mcpo_kernels.prefix_attention.pieces import end_aligned_mask, join, stacked, window_block
from mcpo_kernels.prefix_attention.plan import make_plan
from mcpo_kernels.prefix_attention.scores import widen

if TYPE_CHECKING:
    from torch import Tensor

    from mcpo_kernels.prefix_attention.layout import PrefixLayout
    from mcpo_kernels.prefix_attention.scores import ScoreRule


def attend(
    query_HTD: Tensor, key_HTD: Tensor, value_HTE: Tensor, layout: PrefixLayout, rule: ScoreRule
) -> tuple[Tensor, Tensor]:
    """The output, [T, H, E], and the log-sum-exps of all scores, [T, H], without a gradient.

    Args:
        query_HTD: on the CPU; this and the next two as in ``prefix_attention``.
        key_HTD: keys.
        value_HTE: values.
        layout: with one token at least.
        rule: without softcap and sinks.
    """
    tensors = (query_HTD, key_HTD, value_HTE)
    if has_torch_function(tensors):
        return handle_torch_function(attend, tensors, *tensors, layout, rule)
    return _attend(*tensors, layout, rule, None)


def attend_again(
    tensors: tuple[Tensor, Tensor, Tensor],
    layout: PrefixLayout,
    rule: ScoreRule,
    known: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """``attend(*tensors, layout, rule)``, of which the value is known and the gradient wanted."""
    return _attend(*tensors, layout, rule, known)


def _attend(
    query_HTD: Tensor,
    key_HTD: Tensor,
    value_HTE: Tensor,
    layout: PrefixLayout,
    rule: ScoreRule,
    known: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    num_values, width = value_HTE.shape[-1], max(query_HTD.shape[-1], value_HTE.shape[-1])
    # The kernel wants values as wide as keys.
    query_HTD, key_HTD, value_HTD = (
        widen(tensor, width) for tensor in (query_HTD, key_HTD, value_HTE)
    )
    plan = make_plan(layout, rule.window, window_block(rule.window))
    answers: dict[int, tuple[Tensor, Tensor]] = {}
    calls = zip(plan.groups, stacked(query_HTD, key_HTD, value_HTD, plan), strict=True)
    for group, (first_parts, tensors) in calls:
        mask_LK = end_aligned_mask(tensors[0], tensors[1], rule.window)
        options: dict[str, Any] = {"is_causal": mask_LK is None, "scale": rule.scale}
        if mask_LK is not None:
            options["attn_mask"] = _added(mask_LK, query_HTD.dtype)
        if known is None:
            output_BHLD, lse_BHL = _op("")(*tensors, 0.0, **options)
        else:
            output_BLHE, lse_BLH = (
                torch.stack([join(parts, piece.queries, dim=0) for piece in group])
                for parts in (tensor.split(plan.part_lengths) for tensor in known)
            )
            output_BHLD, lse_BHL = widen(output_BLHE, width).transpose(1, 2), lse_BLH.mT
            output_BHLD = _Known.apply(*tensors, output_BHLD, lse_BHL.contiguous(), options)
        pairs = zip(output_BHLD.transpose(1, 2).unbind(0), lse_BHL.mT.unbind(0), strict=True)
        answers.update(zip(first_parts, pairs, strict=True))
    outputs, lses = zip(*(answers[part] for part in sorted(answers)), strict=True)
    return torch.cat(outputs)[..., :num_values], torch.cat(lses).detach()


class _Known(Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *tensors, ctx.options = arguments
        ctx.save_for_backward(*tensors)
        output_BHLD: Tensor = tensors[3]
        return output_BHLD.view_as(output_BHLD)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *doutputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        gradients = _op("_backward")(*doutputs, *ctx.saved_tensors, 0.0, **ctx.options)
        return *gradients, None, None, None


def _op(part: str) -> Any:
    """torch's kernel, or its backward; they have no public names, so a release may move them.

    Raises:
        RuntimeError: this release has.
    """
    name = f"_scaled_dot_product_flash_attention_for_cpu{part}"
    if not hasattr(torch.ops.aten, name):
        raise RuntimeError(
            f"attention on CPUs needs aten::{name}, which torch {torch.__version__} does not have; "
            "use a release that this package is tested with, or attention_impl: reference"
        )
    return getattr(torch.ops.aten, name)


def _added(mask_LK: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask as something to add to scores, as the kernel wants it."""
    return torch.zeros(mask_LK.shape, dtype=dtype).masked_fill_(~mask_LK, -torch.inf)
