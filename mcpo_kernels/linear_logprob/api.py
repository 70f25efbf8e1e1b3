"""Fused head: log-probabilities of targets, by row or by sequence, without the [N, V] logits."""
# N scored tokens, D hidden, V vocabulary, S sequences

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mcpo_kernels.impl import Impl, resolve
from mcpo_kernels.linear_logprob import ops, reference, validate
from mcpo_kernels.linear_logprob.head import Head

if TYPE_CHECKING:
    from torch import Tensor


# More arguments than the house limit: each option is a keyword of its own.
def linear_logprob(  # noqa: PLR0913
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    cache_mb: float = 0.0,
    filter_mass: float = 0.0,
    impl: Impl | str = Impl.AUTO,
) -> Tensor:
    """Log-probability of each row's target under the language-model head.

    ``log_softmax(softcap(scale * (hidden @ weight.T + bias)))[n, targets[n]]``, ``softcap(z) = c
    * tanh(z / c)``.

    The logits come in float32 straight from the accumulator and are never stored whole unless
    ``cache_mb`` allows it. Scoring under ``no_grad`` and training run the same forward, so their
    results are the same bits; but for ``chunked`` on a device, a row's bits do not depend on the
    other rows either. Rows whose upstream gradient is zero cost no backward, and a gradient nobody
    needs (a frozen head) is not computed. Differentiable once. Autocast does not reach in.

    Args:
        hidden: [N, D] final hidden states of scored tokens; bfloat16, float16, float32 or
            float64.
        weight: [V, D] weight of the head, same dtype and device.
        targets: [N] int64 in [0, V).
        bias: [V] of the head, same dtype and device.
        softcap: c, > 0.
        scale: multiplies the logits before the cap.
        cache_mb: MiB that a forward may keep for its backward, in logits of the accumulation
            dtype, so that these are not computed twice; all of them take 4 bytes each (8 in
            float64), V rounded up to a multiple of 64. Changes no bit of any result. Only ``cpu``
            makes use of it, and holds the memory of the last cache for the next one;
            ``torch.ops.mcpo_cpu.release_cache()`` gives it back.
        filter_mass: in [0, 1). If > 0, the backward of a row leaves out the parts of the
            vocabulary that hold least of its softmax, together at most this share of what the
            target does not hold; what that changes is bounded in docs/numerics.md. Values do not
            change. ``cpu`` and ``triton`` make use of it, and keep N * V / 64 numbers for it.
        impl: see ``Impl``. An explicit choice never falls back.

    Returns:
        [N] float32, float64 for float64 inputs.

    Raises:
        ValueError: a shape, device or value does not fit, or there is no such ``impl``.
        TypeError: a dtype does not fit, or ``weight`` is a DTensor.
        RuntimeError: ``impl`` cannot run here.
    """
    validate.check_inputs(hidden, weight, targets, bias, softcap)
    validate.check_allowance(cache_mb, filter_mass)
    chosen = resolve(impl, hidden.device, hidden.dtype).impl
    if chosen is Impl.REFERENCE:
        validate.check_targets(targets, weight.shape[0])
        return reference.token_logprobs(hidden, targets, Head(weight, bias, softcap, scale))
    if not _needs_backward(hidden, weight, bias):
        cache_mb = filter_mass = 0.0
    return ops.linear_logprob(
        hidden, weight, targets, bias, softcap, scale, cache_mb, filter_mass, chosen.value
    )[0]


# Those of linear_logprob and the two that make sequences.
def sequence_logprobs(  # noqa: PLR0913
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    seq_ids: Tensor,
    num_seqs: int,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    cache_mb: float = 0.0,
    filter_mass: float = 0.0,
    impl: Impl | str = Impl.AUTO,
) -> Tensor:
    """Sum of ``linear_logprob`` over the rows of each sequence.

    Args:
        hidden: as in ``linear_logprob``.
        weight: as in ``linear_logprob``.
        targets: as in ``linear_logprob``.
        seq_ids: [N] int64, the sequence of each row, never decreasing, in [0, num_seqs).
        num_seqs: S. A sequence without rows gets 0.
        bias: as in ``linear_logprob``.
        softcap: as in ``linear_logprob``.
        scale: as in ``linear_logprob``.
        cache_mb: as in ``linear_logprob``.
        filter_mass: as in ``linear_logprob``.
        impl: as in ``linear_logprob``.

    Returns:
        [S] float32, float64 for float64 inputs. Added up in float64 and rounded once.

    Raises:
        ValueError: as in ``linear_logprob``, or ``seq_ids`` decrease or leave [0, num_seqs).
        TypeError: as in ``linear_logprob``, or ``seq_ids`` are not int64.
        RuntimeError: ``impl`` cannot run here.
    """
    validate.check_segments(hidden, seq_ids, num_seqs)
    logp_N = linear_logprob(
        hidden,
        weight,
        targets,
        bias=bias,
        softcap=softcap,
        scale=scale,
        cache_mb=cache_mb,
        filter_mass=filter_mass,
        impl=impl,
    )
    return ops.segment_sum(logp_N, seq_ids, num_seqs)


def _needs_backward(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in tensors
    )
