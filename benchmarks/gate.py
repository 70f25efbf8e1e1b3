"""The gate: nothing is timed before its results were compared with float64.

Values are compared on all rows, the gradient of hidden on a sample of rows, that of weight on a
sample of the vocabulary, summed over all rows. The oracle holds what does not depend on the
upstream gradient g: with p the softmax and s = onehot - p,

    dhidden[n] = g[n] (weight[target[n]] - p[n] @ weight),    dweight[v] = (g * s[:, v]) @ hidden.

An error may be at most 2 * (error of the naive computation) + band. The naive computation rounds
logits, log-probabilities, dz = g s and each result to the dtype of the inputs, which is what
implementations do that hold logits in bf16. The band is that of mcpo_kernels/testing.py, for
gradients as a bound on relative errors: with Z = max |hidden| @ |weight|.T + log V it is
eps(fp32) Z for values and eps(dtype) + 2 eps(fp32) (1 + Z) for gradients. The error of a gradient
is the norm of the difference over the norm of the exact one. A scalar loss adds up two sequences of
T rows: independent errors of b in each row move its margin by b sqrt(2 T), so its value, and its
slopes in relation to themselves, by at most beta times that.
"""
# N scored tokens, D hidden, V vocabulary; R sampled rows, C sampled columns of the vocabulary

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.peers import BETA, NUM_SEQS
from benchmarks.workload import Inputs, Results

NUM_ROWS, NUM_COLUMNS = 16, 64
SLAB = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """Values, and gradients per unit of upstream gradient, at one precision."""

    logp_N: Tensor
    """[N] log-probabilities."""
    dhidden_RD: Tensor
    """[R, D] of the sampled rows, for an upstream gradient of 1."""
    slope_NC: Tensor
    """[N, C] onehot - p in the sampled columns."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Oracle:
    """What results are compared with."""

    exact: Model
    naive: Model
    rows_R: Tensor
    columns_C: Tensor
    largest: float
    """Z of the head of this file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Errors:
    """Largest error of the values, relative errors of the gradients, and what is allowed."""

    value: float
    value_allowed: float
    dhidden: float | None = None
    dhidden_allowed: float | None = None
    dweight: float | None = None
    dweight_allowed: float | None = None


def make_oracle(inputs: Inputs) -> Oracle:
    """Compute in float64 whatever the results of any job are compared with."""
    num_tokens, num_vocab = inputs.target_N.shape[0], inputs.weight_VD.shape[0]
    generator = torch.Generator(torch.get_default_device()).manual_seed(1)
    rows_R = torch.randperm(num_tokens, generator=generator)[:NUM_ROWS]
    # Half of them columns that are some row's target.
    targets = inputs.target_N[torch.randperm(num_tokens, generator=generator)[: NUM_COLUMNS // 2]]
    others = torch.randint(num_vocab, (NUM_COLUMNS // 2,), generator=generator)
    columns_C = torch.cat([targets, others]).unique()
    hidden_ND, weight_VD = inputs.hidden_ND.detach(), inputs.weight_VD.detach()
    return Oracle(
        exact=_model(inputs, rows_R, columns_C, torch.float64),
        naive=_model(inputs, rows_R, columns_C, hidden_ND.dtype),
        rows_R=rows_R,
        columns_C=columns_C,
        largest=max(
            (hidden_ND[rows_R].abs() @ slab.abs().T).max().item() for slab in weight_VD.split(SLAB)
        )
        + math.log(num_vocab),
    )


def check(results: Results, oracle: Oracle, inputs: Inputs, grad_N: Tensor, name: str) -> Errors:
    """Compare the results of a job, whose upstream gradient was ``grad_N``, with the oracle.

    Raises:
        AssertionError: a result is off by more than the gate allows; says which, and both numbers.
    """
    per_row = _values_allowed(oracle)
    if results.value.ndim:
        exact, slack, allowed = oracle.exact.logp_N, 0.0, per_row
    else:
        exact = dpo_loss(oracle.exact.logp_N)
        slack = BETA * per_row * math.sqrt(2 * grad_N.shape[0] / NUM_SEQS)
        allowed, grad_N = slack, dpo_slopes(oracle.exact.logp_N)
    value = _largest(results.value.double() - exact)
    _refuse_if_larger(f"{name}: value", value, allowed)
    if results.dhidden_ND is None or results.dweight_VD is None:
        return Errors(value=value, value_allowed=allowed)
    wanted = _gradients(oracle.exact, oracle, inputs, grad_N)
    plain = _gradients(oracle.naive, oracle, inputs, grad_N)
    eps = torch.finfo(inputs.hidden_ND.dtype).eps
    band = eps + 2 * torch.finfo(torch.float32).eps * (1 + oracle.largest) + slack
    given = (results.dhidden_ND[oracle.rows_R], results.dweight_VD[oracle.columns_C])
    dhidden, dweight = (_relative(a, b) for a, b in zip(given, wanted, strict=True))
    allowed_h, allowed_w = (2 * _relative(a, b) + band for a, b in zip(plain, wanted, strict=True))
    _refuse_if_larger(f"{name}: gradient of hidden", dhidden, allowed_h)
    _refuse_if_larger(f"{name}: gradient of weight", dweight, allowed_w)
    return Errors(
        value=value,
        value_allowed=allowed,
        dhidden=dhidden,
        dhidden_allowed=allowed_h,
        dweight=dweight,
        dweight_allowed=allowed_w,
    )


def dpo_loss(logp_N: Tensor) -> Tensor:
    """The scalar loss of the peers that have one: reference-free DPO, first half preferred."""
    chosen, rejected = logp_N.view(NUM_SEQS, -1).sum(1).chunk(2)
    return -torch.nn.functional.logsigmoid(BETA * (chosen - rejected)).mean()


def dpo_slopes(logp_N: Tensor) -> Tensor:
    """[N] its derivative by each row's log-probability."""
    leaf_N = logp_N.detach().requires_grad_()
    return torch.autograd.grad(dpo_loss(leaf_N), leaf_N)[0]


def _model(inputs: Inputs, rows_R: Tensor, columns_C: Tensor, dtype: torch.dtype) -> Model:
    """At a precision: logits, log-probabilities and slopes are rounded to it, sums are float64."""
    hidden_ND, weight_VD = inputs.hidden_ND.detach().to(dtype), inputs.weight_VD.detach()
    target_N = inputs.target_N
    lse_N = hidden_ND.new_full(target_N.shape, -math.inf, dtype=torch.float64)
    for slab in weight_VD.split(SLAB):
        logits = (hidden_ND @ slab.to(dtype).T).double()
        lse_N = torch.logaddexp(lse_N, logits.logsumexp(1))
    target_logit_N = torch.cat(
        [
            (rows @ weight_VD[targets].to(dtype).T).diagonal()
            for rows, targets in zip(hidden_ND.split(64), target_N.split(64), strict=True)
        ]
    ).double()

    dhidden_RD = torch.zeros(len(rows_R), hidden_ND.shape[1], dtype=torch.float64)
    for start in range(0, weight_VD.shape[0], SLAB):
        slab = weight_VD[start : start + SLAB].to(dtype)
        columns = torch.arange(start, start + slab.shape[0])
        slope = _slopes(hidden_ND[rows_R], slab, target_N[rows_R], columns, lse_N[rows_R])
        dhidden_RD += slope.to(dtype).double() @ slab.double()
    return Model(
        logp_N=(target_logit_N - lse_N).to(dtype).double(),
        dhidden_RD=dhidden_RD.to(dtype),
        slope_NC=_slopes(hidden_ND, weight_VD[columns_C].to(dtype), target_N, columns_C, lse_N),
    )


def _slopes(
    hidden: Tensor, weight: Tensor, targets: Tensor, columns: Tensor, lse: Tensor
) -> Tensor:
    """Onehot - p of some rows in some columns of the vocabulary, from rounded logits."""
    p = ((hidden @ weight.T).double() - lse[:, None]).exp()
    return (targets[:, None] == columns).double() - p


def _gradients(
    model: Model, oracle: Oracle, inputs: Inputs, grad_N: Tensor
) -> tuple[Tensor, Tensor]:
    """[R, D] and [C, D] gradients in the samples."""
    dtype = model.dhidden_RD.dtype
    grad_N = grad_N.double()
    dhidden_RD = grad_N[oracle.rows_R, None] * model.dhidden_RD
    dz_NC = (grad_N[:, None] * model.slope_NC).to(dtype)
    dweight_CD = dz_NC.double().T @ inputs.hidden_ND.detach().double()
    return dhidden_RD.to(dtype), dweight_CD.to(dtype)


def _values_allowed(oracle: Oracle) -> float:
    """For the log-probability of a row."""
    naive = _largest(oracle.naive.logp_N - oracle.exact.logp_N)
    return 2 * naive + torch.finfo(torch.float32).eps * oracle.largest


def _largest(tensor: Tensor) -> float:
    return tensor.abs().max().item()


def _relative(actual: Tensor, exact: Tensor) -> float:
    return ((actual.double() - exact).norm() / exact.norm()).item()


def _refuse_if_larger(what: str, error: float, allowed: float) -> None:
    # Not `error > allowed`: an error that is not a number is refused too.
    assert error <= allowed, (
        f"{what} is off by {error:.2e}, {allowed:.2e} is allowed; it is not timed"
    )
