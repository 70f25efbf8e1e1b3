"""Inputs of a cell, and the jobs an implementation is given.

``score``: log-probabilities of all rows, no gradient. ``train``: those and the gradients of hidden
and weight. ``mcpo``: the rows belong to 6 candidates; all are scored, 2 are trained, which gives
log-probabilities of all rows and gradients through a third of them. One pass is a forward with
gradient over all rows and a backward whose upstream gradient is 0 for the other 4 candidates. Two
passes are a forward without gradient over all rows, then a forward and backward over a third.
"""
# N scored tokens, D hidden, V vocabulary, M rows of the drawn candidates

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.cells import ONE_PASS, Shape

Head = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(hidden, weight, targets) to log-probabilities of the rows, or to one scalar loss."""

TORCH_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
NUM_CANDIDATES = 6
# The preferred candidate and a drawn one, which do not lie side by side.
DRAWN = (0, 3)


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """Arguments of a head; hidden and weight are leaves that require gradient."""

    hidden_ND: Tensor
    weight_VD: Tensor
    target_N: Tensor
    grad_N: Tensor
    drawn_M: Tensor

    @property
    def drawn_grad_N(self) -> Tensor:
        """The upstream gradient with 0 on the rows of candidates that were not drawn."""
        drawn = torch.zeros_like(self.grad_N)
        drawn[self.drawn_M] = self.grad_N[self.drawn_M]
        return drawn


class Results(NamedTuple):
    """What a job gives: values, and gradients if it trains."""

    value: Tensor
    dhidden_ND: Tensor | None
    dweight_VD: Tensor | None

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return sum(tensor.nbytes for tensor in self if tensor is not None)


def make_inputs(shape: Shape, dtype: str) -> Inputs:
    """Random inputs whose logits spread as a model's do: normal, with standard deviation 3.

    On the device that torch creates tensors on.
    """
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    num_tokens, num_hidden, num_vocab = shape
    hidden = torch.randn(num_tokens, num_hidden, generator=generator)
    weight = torch.randn(num_vocab, num_hidden, generator=generator).mul_(3 / num_hidden**0.5)
    return Inputs(
        hidden_ND=hidden.to(TORCH_DTYPES[dtype]).requires_grad_(),
        weight_VD=weight.to(TORCH_DTYPES[dtype]).requires_grad_(),
        target_N=torch.randint(num_vocab, (num_tokens,), generator=generator),
        grad_N=torch.linspace(0.5, 1.0, num_tokens),
        drawn_M=drawn_rows(num_tokens),
    )


def drawn_rows(num_tokens: int) -> Tensor:
    """[M] rows of the drawn candidates."""
    candidate_N = torch.arange(num_tokens) * NUM_CANDIDATES // num_tokens
    return torch.isin(candidate_N, torch.tensor(DRAWN)).nonzero().squeeze(1)


def first_rows(inputs: Inputs, count: int) -> Inputs:
    """The same weight with few rows."""
    return Inputs(
        hidden_ND=inputs.hidden_ND.detach()[:count].requires_grad_(),
        weight_VD=inputs.weight_VD,
        target_N=inputs.target_N[:count],
        grad_N=inputs.grad_N[:count],
        drawn_M=drawn_rows(count),
    )


def make_job(head: Head, inputs: Inputs, pattern: str, way: str) -> Callable[[], Results]:
    """The call that is timed."""
    if pattern == "score":
        return lambda: score(head, inputs)
    if pattern == "train":
        return lambda: train(head, inputs, inputs.grad_N)
    if way == ONE_PASS:
        drawn_grad_N = inputs.drawn_grad_N
        return lambda: train(head, inputs, drawn_grad_N)
    return lambda: score_then_train(head, inputs)


def score(head: Head, inputs: Inputs) -> Results:
    """Values of all rows."""
    # Detached, because there are heads that look at requires_grad and not at the grad mode.
    hidden, weight = inputs.hidden_ND.detach(), inputs.weight_VD.detach()
    with torch.no_grad():
        return Results(head(hidden, weight, inputs.target_N), None, None)


def train(head: Head, inputs: Inputs, grad_N: Tensor) -> Results:
    """Values of all rows and gradients; of a scalar loss, its own."""
    value = head(inputs.hidden_ND, inputs.weight_VD, inputs.target_N)
    upstream = grad_N.to(value.dtype) if value.ndim else None
    leaves = (inputs.hidden_ND, inputs.weight_VD)
    return Results(value.detach(), *torch.autograd.grad(value, leaves, upstream))


def score_then_train(head: Head, inputs: Inputs) -> Results:
    """Values of all rows, then gradients through the drawn ones alone."""
    rows = inputs.drawn_M
    value = score(head, inputs).value
    logp_M = head(inputs.hidden_ND[rows], inputs.weight_VD, inputs.target_N[rows])
    upstream = inputs.grad_N[rows].to(logp_M.dtype)
    leaves = (inputs.hidden_ND, inputs.weight_VD)
    return Results(value, *torch.autograd.grad(logp_M, leaves, upstream))
