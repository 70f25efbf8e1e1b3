"""What needs no ranks of a head sharded over the vocabulary."""

from __future__ import annotations

import pytest
import torch
from conftest import FUSED

from mcpo_kernels import linear_logprob
from mcpo_kernels.linear_logprob import ops, validate
from mcpo_kernels.linear_logprob.agreement import digest
from mcpo_kernels.linear_logprob.head import Allowance, Head, Needs, Saved, Scores
from mcpo_kernels.testing import Shape, make_inputs

OPTIONS = {"bias": True, "softcap": 8.0, "scale": 0.7}


@pytest.mark.parametrize("options", [{}, OPTIONS], ids=["plain", "options"])
@pytest.mark.parametrize("impl", FUSED)
def test_an_implementation_deals_with_targets_outside_its_slab(impl, options):
    """The contract of ``head``."""
    case = make_inputs(Shape(17, 33, 101), torch.float64, **options)
    first, last = 20, 90
    bias = None if case.bias is None else case.bias[first:last]
    head = Head(case.weight[first:last], bias, case.softcap, case.scale)
    place = case.targets - first
    place[:4] = torch.tensor([-1, last - first, -101, 101])
    inside = (place >= 0) & (place < last - first)
    module = ops.IMPLEMENTATIONS[impl]
    partial = module.partial(case.hidden, place, head, Allowance(0.0, 0.0))

    logits = case.scale * (case.hidden @ case.weight[first:last].T + (0 if bias is None else bias))
    if case.softcap is not None:
        logits = case.softcap * torch.tanh(logits / case.softcap)
    close = {"rtol": 1e-13, "atol": 1e-13}
    torch.testing.assert_close(partial.max_N, logits.amax(1), **close)
    torch.testing.assert_close(
        partial.sum_N, (logits - logits.amax(1)[:, None]).exp().sum(1), **close
    )
    torch.testing.assert_close(
        partial.target_logit_N[inside], logits[inside, place[inside]], **close
    )

    # Any lse above that of the slab will do for that of the whole vocabulary.
    lse = logits.logsumexp(1) + 0.5
    logp = torch.where(inside, logits.gather(1, place.clamp(0, 69)[:, None]).squeeze(1) - lse, -1.0)
    saved = Saved(case.hidden, place, Scores(logp, lse, *partial[3:]))
    gradients = module.backward(case.grad, saved, head, 0.0, Needs(True, True, bias is not None))
    onehot = torch.zeros_like(logits)
    onehot[inside, place[inside]] = 1.0
    slope = 1.0 if case.softcap is None else 1 - (logits / case.softcap).square()
    dz = case.grad[:, None] * (onehot - (logits - lse[:, None]).exp()) * slope * case.scale
    torch.testing.assert_close(gradients.hidden_ND, dz @ head.weight_VD, **close)
    torch.testing.assert_close(gradients.weight_VD, dz.T @ case.hidden, **close)
    if bias is not None:
        torch.testing.assert_close(gradients.bias_V, dz.sum(0), **close)


@pytest.mark.parametrize("group", ["tp", 3])
def test_a_group_of_another_type_is_refused(group):
    case = make_inputs(Shape(17, 33, 101), torch.float64)
    with pytest.raises(TypeError, match=r"group must be a torch\.distributed Process"):
        linear_logprob(case.hidden, case.weight, case.targets, group=group)


def test_a_digest_tells_tensors_apart():
    targets = torch.arange(40)
    assert digest(targets) == digest(targets.clone())
    others = [
        targets + 1,
        targets.flip(0),
        targets[1:],
        targets.roll(1),
        targets[[1, 0, *range(2, 40)]],
    ]
    assert digest(targets) not in [digest(other) for other in others]
    assert digest(torch.zeros(3, 5, dtype=torch.bfloat16)) == 0
    assert digest(torch.zeros(0, 5)) == 0


def test_slabs_of_zeros_are_not_taken_for_the_same():
    sizes = torch.tensor([4, 4, 0])
    validate.check_slabs(sizes, torch.tensor([0, 0, 0]))
    validate.check_slabs(sizes, torch.tensor([5, 6, 0]))
    with pytest.raises(ValueError, match="ranks 0 and 1"):
        validate.check_slabs(sizes, torch.tensor([5, 5, 0]))
