from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from conftest import FUSED

from mcpo_kernels import linear_logprob, sequence_logprobs
from mcpo_kernels.linear_logprob import chunked
from mcpo_kernels.testing import SHAPES, Shape, assert_within_budget, evaluate, make_inputs

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
IMPLS = ("reference", *FUSED)
ALIGNED, RAGGED, *_ = SHAPES
NO_TOKENS = SHAPES[3]
SLABS = SHAPES[6]
HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 5.0},
    "scale": {"scale": 0.3},
    "all": {"bias": True, "softcap": 30.0, "scale": 2.0},
}


def shape_id(shape: Shape) -> str:
    return f"N{shape.num_tokens}-D{shape.num_hidden}-V{shape.num_vocab}"


@pytest.fixture
def gemms(monkeypatch):
    """Shapes (rows, inner, columns) of the GEMMs that ``chunked`` runs."""
    shapes: list[tuple[int, int, int]] = []
    exact = chunked.matmul

    def counted(left, right):
        shapes.append((*left.shape, right.shape[1]))
        return exact(left, right)

    monkeypatch.setattr(chunked, "matmul", counted)
    return shapes


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_value_and_gradients_within_budget(impl, dtype, shape, head):
    assert_within_budget(impl, make_inputs(shape, dtype, **head))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("impl", FUSED)
def test_huge_logits_within_budget(impl, dtype, sign):
    assert_within_budget(impl, make_inputs(RAGGED, dtype, peak=sign * 1e4))


@pytest.mark.parametrize("impl", FUSED)
def test_every_target_the_same(impl):
    case = make_inputs(ALIGNED, torch.float32)
    case.targets.fill_(7)
    assert_within_budget(impl, case)


def test_budget_refuses_rounded_logits(monkeypatch):
    exact = chunked.matmul
    monkeypatch.setattr(chunked, "matmul", lambda a, b: exact(a, b).bfloat16().float())
    with pytest.raises(AssertionError, match=r"logp: error .* exceeds"):
        assert_within_budget("chunked", make_inputs(ALIGNED, torch.float32))


def test_budget_refuses_a_wrong_gradient(monkeypatch):
    exact = chunked.dlogits_tile
    monkeypatch.setattr(chunked, "dlogits_tile", lambda *a: exact(*a) * (1 + 1e-4))
    with pytest.raises(AssertionError, match=r"dhidden: error .* exceeds"):
        assert_within_budget("chunked", make_inputs(ALIGNED, torch.float32))


@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=3)), ids=str)
@pytest.mark.parametrize("impl", FUSED)
def test_every_subset_of_gradients(impl, needs):
    case = make_inputs(Shape(9, 6, 11), torch.float64, bias=True)
    expected = evaluate("reference", case)[1:]
    leaves = [case.hidden.clone(), case.weight.clone(), case.bias.clone()]
    for leaf, need in zip(leaves, needs, strict=True):
        leaf.requires_grad_(need)
    logp = linear_logprob(leaves[0], leaves[1], case.targets, bias=leaves[2], impl=impl)
    assert logp.requires_grad == any(needs)
    if any(needs):
        logp.backward(case.grad)
    for leaf, need, gradient in zip(leaves, needs, expected, strict=True):
        if need:
            torch.testing.assert_close(leaf.grad, gradient, rtol=1e-13, atol=1e-13)
        else:
            assert leaf.grad is None


@pytest.mark.parametrize("frozen", ["weight", "hidden"])
def test_gradient_nobody_needs_costs_no_gemm(frozen, gemms):
    case = make_inputs(Shape(16, 6, 11), torch.float32)
    hidden = case.hidden.requires_grad_(frozen != "hidden")
    weight = case.weight.requires_grad_(frozen != "weight")
    logp = linear_logprob(hidden, weight, case.targets, impl="chunked")
    gemms.clear()
    logp.sum().backward()
    logits, gradient = gemms
    assert logits == (16, 16, 64)
    assert gradient == ((16, 11, 16) if frozen == "weight" else (11, 16, 16))


def test_rows_without_gradient_reach_no_gemm_of_the_backward(gemms):
    case = make_inputs(Shape(160, 6, 11), torch.float32)
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_()
    logp = linear_logprob(hidden, weight, case.targets, impl="chunked")
    grad = torch.zeros_like(logp)
    grad[5], grad[150] = 1.0, -1.0
    gemms.clear()
    logp.backward(grad)
    # Two rows; the logits in the padding that makes a row's bits independent of its neighbours.
    assert gemms == [(16, 16, 64), (2, 11, 16), (11, 2, 16)]
    assert hidden.grad.abs().sum(1).nonzero().squeeze(1).tolist() == [5, 150]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", FUSED)
def test_poisoned_rows_without_gradient_do_not_spread(impl, dtype):
    case = make_inputs(RAGGED, dtype, bias=True)
    clean = evaluate(impl, case)
    poisoned_rows = case.grad == 0
    case.hidden[poisoned_rows] = torch.nan
    poisoned = evaluate(impl, case)
    assert poisoned.logp[poisoned_rows].isnan().all()
    assert torch.equal(poisoned.logp[~poisoned_rows], clean.logp[~poisoned_rows])
    for ours, expected in zip(poisoned[1:], clean[1:], strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_no_gradient_at_all(impl):
    case = make_inputs(RAGGED, torch.float32)
    case.grad.zero_()
    for gradient in evaluate(impl, case)[1:3]:
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_in_nan_out(impl):
    case = make_inputs(RAGGED, torch.float32)
    case.hidden[3, 2] = torch.nan
    logp = linear_logprob(case.hidden, case.weight, case.targets, impl=impl)
    assert logp.isnan().nonzero().squeeze(1).tolist() == [3]
    case.weight[100] = torch.nan
    assert linear_logprob(case.hidden, case.weight, case.targets, impl=impl).isnan().all()


@pytest.mark.parametrize("impl", FUSED)
def test_bias_of_minus_infinity_bans_a_whole_slab(impl):
    case = make_inputs(SLABS, torch.float64, bias=True)
    case.bias[:2000] = -torch.inf
    case.targets.clamp_(min=2000)
    ours, exact = evaluate(impl, case), evaluate("reference", case)
    for actual, expected in zip(ours, exact, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", FUSED)
def test_strided_inputs(impl):
    case = make_inputs(RAGGED, torch.float32)
    plain = linear_logprob(case.hidden, case.weight, case.targets, impl=impl)
    strided = case.hidden.repeat_interleave(2, 1)[:, ::2]
    assert torch.equal(linear_logprob(strided, case.weight, case.targets, impl=impl), plain)
    turned = linear_logprob(case.hidden, case.weight.T.clone().T, case.targets, impl=impl)
    torch.testing.assert_close(turned, plain, rtol=0, atol=4e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", FUSED)
def test_scoring_and_training_are_the_same_bits_every_time(impl, dtype):
    case = make_inputs(SLABS, dtype)
    trained = evaluate(impl, case)
    with torch.no_grad():
        scored = linear_logprob(case.hidden, case.weight, case.targets, impl=impl)
    assert torch.equal(scored, trained.logp)
    for first, second in zip(trained, evaluate(impl, case), strict=True):
        assert first is None or torch.equal(first, second)


@pytest.mark.parametrize("num_vocab", [1, 2, 20, 101, 2049, 4099])
@pytest.mark.parametrize("num_hidden", [7, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", FUSED)
def test_bits_of_a_row_depend_on_nothing_but_the_row(
    impl, dtype, num_hidden, num_vocab, monkeypatch
):
    case = make_inputs(Shape(301, num_hidden, num_vocab), dtype, bias=True)
    everything = torch.arange(301)

    def score(rows):
        return linear_logprob(
            case.hidden[rows], case.weight, case.targets[rows], bias=case.bias, impl=impl
        )

    together = score(everything)
    for rows in (everything[:1], everything[3:4], everything[5:22], everything.flip(0)):
        assert torch.equal(score(rows), together[rows])
    monkeypatch.setattr(chunked, "CPU_TILE", chunked.CPU_TILE._replace(budget_mib=1))
    assert torch.equal(score(everything), together)


def test_logits_stay_within_the_stated_budget(gemms):
    case = make_inputs(Shape(1500, 4, 5000), torch.float32)
    linear_logprob(case.hidden, case.weight, case.targets, impl="chunked")
    cells = [rows * columns for rows, _, columns in gemms]
    assert chunked.MIB < max(cells) * 4 <= chunked.CPU_TILE.budget_mib * chunked.MIB
    assert sum(cells) == 1504 * 5000


@pytest.mark.parametrize("impl", FUSED)
def test_gradcheck(impl):
    case = make_inputs(Shape(7, 5, 11), torch.float64, bias=True)
    seq_ids = torch.tensor([0, 0, 1, 1, 3, 3, 3])

    def summed(hidden, weight, bias):
        return sequence_logprobs(
            hidden,
            weight,
            case.targets,
            seq_ids,
            5,
            bias=bias,
            softcap=4.0,
            scale=0.7,
            impl=impl,
        )

    leaves = [leaf.requires_grad_() for leaf in (case.hidden, case.weight, case.bias)]
    assert torch.autograd.gradcheck(summed, leaves)


SEGMENTS = {
    "one sequence": ([0] * 6, 1),
    "one token each": ([0, 1, 2, 3, 4, 5], 6),
    "holes": ([1, 1, 1, 4, 4, 6], 9),
}


@pytest.mark.parametrize(("ids", "num_seqs"), SEGMENTS.values(), ids=SEGMENTS)
@pytest.mark.parametrize("impl", IMPLS)
def test_sequence_sums(impl, ids, num_seqs):
    case = make_inputs(Shape(6, 5, 11), torch.float64)
    arguments = (case.hidden, case.weight, case.targets)
    sums = sequence_logprobs(*arguments, torch.tensor(ids), num_seqs, impl=impl)
    rows = linear_logprob(*arguments, impl=impl)
    for sequence in range(num_seqs):
        expected = sum(rows[n].item() for n in range(6) if ids[n] == sequence)
        assert sums[sequence].item() == pytest.approx(expected, rel=1e-15, abs=1e-15)


@pytest.mark.parametrize("num_seqs", [0, 3])
def test_no_tokens(num_seqs):
    case = make_inputs(NO_TOKENS, torch.float32)
    nothing = torch.zeros(0, dtype=torch.int64)
    sums = sequence_logprobs(case.hidden, case.weight, case.targets, nothing, num_seqs)
    assert torch.equal(sums, torch.zeros(num_seqs))


def test_long_sums_are_rounded_once():
    case = make_inputs(Shape(1043, 8, 67), torch.float32)
    arguments = (case.hidden, case.weight, case.targets)
    total = sequence_logprobs(*arguments, torch.zeros(1043, dtype=torch.int64), 1)
    assert total.item() == linear_logprob(*arguments).double().sum().float().item()
