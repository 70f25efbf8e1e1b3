"""What tests and benchmarks of an implementation share: inputs, a grid of shapes, an error budget.

The budget is derived and nothing in it is tuned. With z the logits and g the upstream gradient, an
implementation may be off from the float64 oracle by

    2 * (error of the naive computation) + band.

The naive computation holds all logits; for values it works in the accumulation dtype, which is what
an implementation promises for bf16 and fp16 inputs too, and for gradients in the dtype of the
inputs. On a GPU its logits of 16-bit inputs come out of the device's own product of 16 bits into
float32 sums: tensor cores are known to truncate where they add, and what they lose is not the error
of an implementation. The band is what remains where the naive error happens to be 0: one rounding
at the largest number met on the way. For values that is Z = max |scale| (|hidden| @ |weight|.T +
|bias|) + log V, as every partial sum of every logit and lse is bounded by it. For a gradient it is
A, the largest entry of the same product with absolute values, |g| (p + onehot) in the place of
g (onehot - p). It is rounded once to the dtype of the result, and p carries the roundings of z and
of lse, and the slope of the softcap its own: (eps(result) + 2 eps(accumulation) (1 + Z)) A.
"""
# N scored tokens, D hidden, V vocabulary

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch

from mcpo_kernels.impl import Impl
from mcpo_kernels.linear_logprob.api import linear_logprob
from mcpo_kernels.linear_logprob.head import accumulation_dtype

if TYPE_CHECKING:
    from torch import Tensor


class Shape(NamedTuple):
    """Sizes of a case."""

    num_tokens: int
    num_hidden: int
    num_vocab: int


SHAPES = (
    Shape(32, 64, 128),
    Shape(17, 33, 101),
    Shape(1, 8, 50),
    Shape(0, 8, 50),
    Shape(5, 1, 7),
    Shape(3, 8, 1),
    # Several slabs of the vocabulary, cut unevenly.
    Shape(19, 16, 4099),
    # Several tiles of rows, the last one ragged.
    Shape(1043, 8, 67),
)
"""Aligned, ragged, degenerate, and larger than one tile of any implementation on the CPU."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """Arguments of ``linear_logprob`` and an upstream gradient."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    grad: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0

    def to(self, dtype: torch.dtype) -> Case:
        """The same numbers in another dtype."""
        return replace(
            self,
            hidden=self.hidden.to(dtype),
            weight=self.weight.to(dtype),
            grad=self.grad.to(accumulation_dtype(dtype)),
            bias=None if self.bias is None else self.bias.to(dtype),
        )


class Results(NamedTuple):
    """What a case evaluates to."""

    logp: Tensor
    dhidden: Tensor
    dweight: Tensor
    dbias: Tensor | None


def make_inputs(
    shape: Shape,
    dtype: torch.dtype,
    *,
    seed: int = 0,
    bias: bool = False,
    softcap: float | None = None,
    scale: float = 1.0,
    peak: float = 10.0,
) -> Case:
    """Random inputs; every other row's target has a logit of about ``peak``, as in trained models.

    A third of the rows have no upstream gradient.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    num_tokens, num_hidden, num_vocab = shape
    weight = normal(num_vocab, num_hidden) / num_hidden**0.5
    targets = torch.randint(num_vocab, (num_tokens,), generator=generator)
    hidden = normal(num_tokens, num_hidden)
    towards = weight[targets]
    hidden[::2] = (peak * towards / towards.square().sum(1, keepdim=True).clamp(min=0.01))[::2]
    grad = normal(num_tokens)
    grad[::3] = 0.0
    case = Case(
        hidden=hidden,
        weight=weight,
        targets=targets,
        grad=grad,
        bias=normal(num_vocab) if bias else None,
        softcap=softcap,
        scale=scale,
    )
    return case.to(dtype)


def evaluate(
    impl: Impl | str, case: Case, *, cache_mb: float = 0.0, filter_mass: float = 0.0
) -> Results:
    """Value and all gradients of a case under an implementation."""
    hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
    bias = None if case.bias is None else case.bias.clone().requires_grad_()
    logp = linear_logprob(
        hidden,
        weight,
        case.targets,
        bias=bias,
        softcap=case.softcap,
        scale=case.scale,
        cache_mb=cache_mb,
        filter_mass=filter_mass,
        impl=impl,
    )
    leaves = [hidden, weight] if bias is None else [hidden, weight, bias]
    dhidden, dweight, *dbias = torch.autograd.grad(logp, leaves, case.grad)
    return Results(logp.detach(), dhidden, dweight, dbias[0] if dbias else None)


def assert_within_budget(impl: Impl | str, case: Case, *, filter_mass: float = 0.0) -> None:
    """Compare value and gradients with the float64 oracle, by the budget at the top of this file.

    Raises:
        AssertionError: an error exceeds its budget; says which, and both numbers.
    """
    assert_results_within_budget(evaluate(impl, case, filter_mass=filter_mass), case)


def assert_results_within_budget(actual: Results, case: Case) -> None:
    """The same of results however obtained.

    Raises:
        AssertionError: as ``assert_within_budget``.
    """
    oracle = evaluate(Impl.REFERENCE, case.to(torch.float64))
    accumulation = accumulation_dtype(case.hidden.dtype)
    naive = Results(_naive_values(case), *_naive_gradients(case))
    bands = _rounding_bands(case)
    for name, ours, exact, plain, band in zip(
        Results._fields, actual, oracle, naive, bands, strict=True
    ):
        if ours is None or exact is None or plain is None:
            continue
        wanted = accumulation if name == "logp" else case.hidden.dtype
        assert ours.dtype == wanted, f"{name} must be {wanted}, got {ours.dtype}"
        assert ours.shape == exact.shape, f"{name} must be {exact.shape}, got {ours.shape}"
        error, naive_error = _largest(ours - exact), _largest(plain - exact)
        budget = 2 * naive_error + band
        assert error <= budget, (
            f"{name}: error {error:.3e} exceeds {budget:.3e} "
            f"(naive error {naive_error:.3e}, rounding band {band:.3e})"
        )


def _naive_values(case: Case) -> Tensor:
    """Log-probabilities of the naive computation, with logits in the accumulation dtype."""
    accumulation = accumulation_dtype(case.hidden.dtype)
    if case.hidden.device.type == "cpu" or case.hidden.dtype == accumulation:
        return evaluate(Impl.REFERENCE, case.to(accumulation)).logp
    logits = torch.mm(case.hidden, case.weight.T, out_dtype=accumulation)
    logits = case.scale * (logits if case.bias is None else logits + case.bias)
    if case.softcap is not None:
        logits = case.softcap * torch.tanh(logits / case.softcap)
    return torch.log_softmax(logits, dim=1).gather(1, case.targets[:, None]).squeeze(1)


def _naive_gradients(case: Case) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of the naive computation, with logits in the dtype of the inputs."""
    hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
    bias = None if case.bias is None else case.bias.clone().requires_grad_()
    logits = case.scale * torch.nn.functional.linear(hidden, weight, bias)
    if case.softcap is not None:
        logits = case.softcap * torch.tanh(logits / case.softcap)
    logps = torch.log_softmax(logits.to(case.grad.dtype), dim=1)
    logp = logps.gather(1, case.targets[:, None]).squeeze(1)
    leaves = [hidden, weight] if bias is None else [hidden, weight, bias]
    dhidden, dweight, *dbias = torch.autograd.grad(logp, leaves, case.grad)
    return dhidden, dweight, dbias[0] if dbias else None


def _rounding_bands(case: Case) -> tuple[float, float, float, float]:
    """Of logp and of the gradients of hidden, weight and bias."""
    accumulation = torch.finfo(accumulation_dtype(case.hidden.dtype)).eps
    result = torch.finfo(case.hidden.dtype).eps
    exact = case.to(torch.float64)
    hidden, weight, scale = exact.hidden.abs(), exact.weight.abs(), abs(case.scale)
    bias = weight.new_zeros(weight.shape[0]) if exact.bias is None else exact.bias
    logits = case.scale * (exact.hidden @ exact.weight.T + bias)
    if case.softcap is not None:
        logits = case.softcap * torch.tanh(logits / case.softcap)
    onehot = torch.nn.functional.one_hot(case.targets, weight.shape[0])
    dlogits = scale * exact.grad.abs()[:, None] * (logits.softmax(1) + onehot)

    largest = (
        _largest(scale * (hidden @ weight.T + bias.abs()))
        + weight.new_tensor(weight.shape[0]).log().item()
    )
    relative = result + 2 * accumulation * (1 + largest)
    return (
        accumulation * largest,
        relative * _largest(dlogits @ weight),
        relative * _largest(dlogits.T @ hidden),
        relative * _largest(dlogits.sum(0)),
    )


def _largest(tensor: Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0
