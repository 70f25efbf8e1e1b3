"""The Triton kernels on slabs of a vocabulary, in the interpreter (``test_kernels_triton.py``)."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from mcpo_kernels.linear_logprob.head import Allowance, Head, Needs, Saved, Scores, finish
from mcpo_kernels.linear_logprob.triton import entry
from mcpo_kernels.testing import Results, Shape, assert_results_within_budget, make_inputs

if not entry.INSTALLED:
    pytest.skip("triton is not installed", allow_module_level=True)

# Masked lanes and empty halves of a merge make infinities on the way.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


@pytest.mark.interpret
@pytest.mark.parametrize("borders", [(0, 150, 389), (0, 1, 388, 389)], ids=str)
def test_slabs_make_the_whole_head(borders):
    """The contract of ``head``: a target outside of a slab is none of its columns."""
    case = make_inputs(Shape(19, 8, 389), torch.float32, bias=True, softcap=30.0, scale=2.0)
    assert case.bias is not None
    slabs = list(pairwise(borders))
    heads = [Head(case.weight[a:b], case.bias[a:b], case.softcap, case.scale) for a, b in slabs]
    places = [case.targets - first for first, _ in slabs]
    parts = [
        entry.partial(case.hidden, place, head, Allowance(0.0, 0.0))
        for place, head in zip(places, heads, strict=True)
    ]
    max_N = torch.stack([part.max_N for part in parts]).amax(0)
    sum_N = sum(part.sum_N * (part.max_N - max_N).exp() for part in parts)
    target_logit_N = torch.stack(
        [
            part.target_logit_N.where((place >= 0) & (place < len(head.weight_VD)), 0.0)
            for part, place, head in zip(parts, places, heads, strict=True)
        ]
    ).sum(0)
    logp_N, lse_N = finish(max_N, sum_N, target_logit_N)
    gradients = [
        entry.backward(
            case.grad,
            Saved(case.hidden, place, Scores(logp_N, lse_N, *part[3:])),
            head,
            0.0,
            Needs(True, True, True),
        )
        for part, place, head in zip(parts, places, heads, strict=True)
    ]
    dhidden_ND = torch.stack([each.hidden_ND for each in gradients]).sum(0)
    dweight_VD = torch.cat([each.weight_VD for each in gradients])
    dbias_V = torch.cat([each.bias_V for each in gradients])
    assert_results_within_budget(Results(logp_N, dhidden_ND, dweight_VD, dbias_V), case)
