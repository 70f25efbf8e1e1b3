"""The gradient filter of the Triton kernels in the interpreter: see ``test_kernels_triton.py``."""

from __future__ import annotations

import pytest
import torch

from mcpo_kernels.linear_logprob.head import PANEL, Saved
from mcpo_kernels.linear_logprob.triton import entry
from mcpo_kernels.testing import Shape, assert_within_budget, evaluate, make_inputs

if not entry.INSTALLED:
    pytest.skip("triton is not installed", allow_module_level=True)

from mcpo_kernels.linear_logprob import ops
from mcpo_kernels.linear_logprob.triton import selection
from mcpo_kernels.linear_logprob.triton.rows import rows_with_gradient

interpreted = pytest.mark.interpret
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

RAGGED = Shape(17, 33, 101)
# Two blocks of rows, a prime vocabulary of four tiles and seven panels.
SEVERAL = Shape(19, 8, 389)


def needed_panels(case, filter_mass):
    scores = ops.Scores(
        *ops.linear_logprob(
            case.hidden, case.weight, case.targets, None, None, 1.0, 0.0, filter_mass, "triton"
        )
    )
    found = rows_with_gradient(case.grad, Saved(case.hidden, case.targets, scores))
    return scores, found, selection.select(found, scores, filter_mass)


@interpreted
def test_panels_hold_what_their_columns_hold():
    case = make_inputs(SEVERAL, torch.float32)
    scores, *_ = needed_panels(case, 0.1)
    logit = torch.nn.functional.pad(
        case.hidden @ case.weight.T, (0, -389 % PANEL), value=-torch.inf
    )
    expected = logit.view(19, -1, PANEL).logsumexp(2)
    torch.testing.assert_close(scores.panel_lse_NQ, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("filter_mass", [0.01, 0.3])
@interpreted
def test_exactly_the_smallest_panels_may_be_left_out(filter_mass):
    """The rule by a sort, in the order of docs/numerics.md."""
    case = make_inputs(SEVERAL, torch.float32)
    scores, found, needed = needed_panels(case, filter_mass)
    count = int(found.count_1)
    assert not needed.panel_NQ[count:].any()
    for place, row in enumerate(found.row_N[:count].tolist()):
        mass = (scores.panel_lse_NQ[row] - scores.lse_N[row]).exp()
        spared = filter_mass * -scores.logp_N[row].double().expm1()
        ascending = mass.sort().values
        left_out = int((ascending.double().cumsum(0) <= spared).sum())
        expected = mass >= ascending[left_out]
        expected[case.targets[row] // PANEL] = True
        assert torch.equal(needed.panel_NQ[place], expected)


@interpreted
def test_what_is_no_number_needs_everything():
    case = make_inputs(RAGGED, torch.float32)
    case.grad[4], case.hidden[7, 0], case.grad[7] = torch.nan, torch.nan, 1.0
    _, found, needed = needed_panels(case, 0.5)
    rows = found.row_N.tolist()
    assert needed.panel_NQ[rows.index(4)].all()
    assert needed.panel_NQ[rows.index(7)].all()


@interpreted
def test_the_filter_keeps_to_its_bound_and_leaves_tiles_out(narrow_slabs):
    """The bounds of docs/numerics.md, and one rounding of the exact gradient each."""
    case = make_inputs(SEVERAL, torch.float32, bias=True, scale=1.5)
    case.targets.remainder_(128)
    case.bias[128:384] -= 12.0
    exact, filtered = evaluate("triton", case), evaluate("triton", case, filter_mass=0.01)
    assert torch.equal(filtered.logp, exact.logp)
    assert filtered.dbias[128:384].count_nonzero() == 0
    assert filtered.dweight[128:384].count_nonzero() == 0
    assert exact.dweight[128:384].count_nonzero() > 0
    left_out = case.grad.abs() * 0.01 * -exact.logp.expm1() * 1.5
    rounding = torch.finfo(torch.float32).eps * 389
    error = (filtered.dhidden - exact.dhidden).norm(dim=1)
    size = exact.dhidden.norm(dim=1)
    assert (error <= left_out * case.weight.norm(dim=1).max() + rounding * size).all()
    error = (filtered.dweight - exact.dweight).norm(dim=1).sum()
    assert error <= (left_out * case.hidden.norm(dim=1)).sum() + rounding * exact.dweight.norm()
    assert (filtered.dbias - exact.dbias).abs().sum() <= left_out.sum() + rounding


@interpreted
def test_a_filter_of_next_to_nothing_is_within_the_budget_of_the_whole(narrow_slabs):
    case = make_inputs(SEVERAL, torch.float16, bias=True, softcap=30.0, scale=2.0)
    assert_within_budget("triton", case, filter_mass=1e-20)
