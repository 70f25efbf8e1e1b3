"""No arm is timed before its loss and its gradient were compared with float64.

The exact step is plain: every sequence goes through the model alone, unpadded, all its logits are
stored, and everything is float64. The naive step is the same computation in the problem's
precision, and its errors are what rounding costs here.

The gradient of an arm, all parameters as one vector, may have a relative error of

    2 * (that of the naive step) + eps32 + 2 eps32 (1 + Z),    Z = max |hidden| @ |weight|.T + log V

which is the rule of benchmarks/gate.py: the second part is what the slopes of a head in float32 may
be off by in relation to themselves, and the body is linear in them. The loss moves by at most beta
times what the margin of two sums of log-probabilities moves by. Of tokens' errors, whose scale r is
pooled over tokens and over sums as in docs/numerics.md, a margin over n of them has at most

    2 * TAIL * r * sqrt(n) + the float32 bands of both sums.
"""
# L completion tokens, V vocabulary

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.step import models
from benchmarks.step.problem import CONFIG, Problem
from mcpo.self_check import TAIL, float32_band

EPS32 = torch.finfo(torch.float32).eps
SLAB = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """Of a plain step."""

    loss: float
    logps: list[Tensor]
    """[L] of each sequence, chosen and drawn of one group after those of another."""
    gradients: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Oracle:
    """What arms are compared with."""

    exact: Outcome
    naive_error: float
    """Of the gradient."""
    loss_allowed: float
    gradient_allowed: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Errors:
    """Of an arm, and what is allowed."""

    loss: float
    loss_allowed: float
    gradient: float
    gradient_allowed: float


def make_oracle(problem: Problem, model: PreTrainedModel) -> Oracle:
    """Take the exact and the naive step; a model is copied for each."""
    pairs = problem.pairs()
    largest: list[float] = []
    exact = plain_step(pairs, models.exact(model), None, largest)
    naive = plain_step(pairs, models.sharing(model), problem.autocast_dtype, [])
    error = relative_error(naive.gradients, exact.gradients)
    units = max(largest) + math.log(model.config.get_text_config().vocab_size)
    return Oracle(
        exact=exact,
        naive_error=error,
        loss_allowed=_loss_allowed(naive.logps, exact.logps),
        gradient_allowed=2 * error + EPS32 + 2 * EPS32 * (1 + units),
    )


def check(loss: Tensor, model: PreTrainedModel, oracle: Oracle, name: str) -> Errors:
    """Compare the loss of an arm, and the gradients it left in its model.

    Raises:
        AssertionError: one is off by more than is allowed; says which, and both numbers.
    """
    error = abs(loss.item() - oracle.exact.loss)
    assert error <= oracle.loss_allowed, (
        f"{name}: the loss is off by {error:.2e}, {oracle.loss_allowed:.2e} is allowed; it is not "
        "timed"
    )
    gradient = relative_error(gradients(model), oracle.exact.gradients)
    assert gradient <= oracle.gradient_allowed, (
        f"{name}: the gradient is off by {gradient:.2e}, {oracle.gradient_allowed:.2e} is allowed; "
        "it is not timed"
    )
    return Errors(
        loss=error,
        loss_allowed=oracle.loss_allowed,
        gradient=gradient,
        gradient_allowed=oracle.gradient_allowed,
    )


def plain_step(
    pairs: Problem, model: PreTrainedModel, dtype: torch.dtype | None, largest: list[float]
) -> Outcome:
    """DPO on each pair, sequence by sequence.

    Args:
        pairs: a problem of pairs.
        model: changed.
        dtype: of autocast, if any.
        largest: the largest partial sum of a logit of each sequence is added.
    """
    # Values do not change; the activations of long sequences in float64 would not all fit.
    model.train().activation_checkpointing_enable({"use_reentrant": False})
    projection = model.get_output_embeddings()
    assert projection is not None
    logps: list[Tensor] = []
    for group in pairs.groups:
        for ids in group.candidate_ids:
            with torch.autocast(model.device.type, dtype=dtype, enabled=dtype is not None):
                token_T = torch.tensor([*group.prompt_ids, *ids], device=model.device)
                hidden_TD = model.base_model(
                    input_ids=token_T[None], use_cache=False
                ).last_hidden_state[0]
                hidden_LD = hidden_TD[-len(ids) - 1 : -1]
                weight_VD = projection.weight
                logit_LV = torch.nn.functional.linear(hidden_LD, weight_VD)
            largest.append(_largest(hidden_LD, weight_VD))
            wide = torch.promote_types(logit_LV.dtype, torch.float32)
            logp_LV = logit_LV.to(wide).log_softmax(dim=1)
            logps.append(logp_LV.gather(1, token_T[-len(ids) :, None]).squeeze(1))
    reference_S = torch.tensor(
        [value for group in pairs.groups for value in pairs.reference[group.row_id]],
        device=model.device,
    )
    ratio_P2 = (torch.stack([logp_L.sum() for logp_L in logps]) - reference_S).view(-1, 2)
    margin_P = CONFIG.loss.beta * (ratio_P2[:, 0] - ratio_P2[:, 1])
    loss = -torch.nn.functional.logsigmoid(margin_P).mean()
    loss.backward()
    return Outcome(
        loss=loss.item(),
        logps=[logp_L.detach().cpu() for logp_L in logps],
        gradients=gradients(model),
    )


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    """By name, of the model as it was before an arm put other modules around its weights."""
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        found[name] = parameter.grad
    return found


def relative_error(actual: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """Of all parameters as one vector, in the Euclidean norm."""
    assert actual.keys() == exact.keys(), sorted(actual.keys() ^ exact.keys())
    off = sum((actual[name].double() - exact[name]).square().sum().item() for name in exact)
    whole = sum(gradient.double().square().sum().item() for gradient in exact.values())
    return math.sqrt(off / whole)


@torch.no_grad()
def _largest(hidden_LD: Tensor, weight_VD: Tensor) -> float:
    size_LD = hidden_LD.float().abs()
    return max(float((size_LD @ slab.float().abs().T).max()) for slab in weight_VD.split(SLAB))


def _loss_allowed(naive: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The mean over prompts of what each margin may move by, times beta."""
    errors = [ours.double() - theirs for ours, theirs in zip(naive, exact, strict=True)]
    of_tokens = torch.cat(errors).square().mean().sqrt()
    of_sums = torch.stack([e_L.sum() / math.sqrt(len(e_L)) for e_L in errors])
    scale = torch.maximum(of_tokens, of_sums.square().mean().sqrt())
    sum_S = torch.stack([logp_L.sum() for logp_L in exact])
    length_S = torch.tensor([float(len(logp_L)) for logp_L in exact])
    allowed_P = 2 * TAIL * scale * length_S.view(-1, 2).sum(dim=1).sqrt()
    allowed_P = allowed_P + float32_band(sum_S, length_S).view(-1, 2).sum(dim=1)
    return CONFIG.loss.beta * allowed_P.mean().item()
