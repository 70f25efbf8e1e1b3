"""The fused head on a CUDA device: values, gradients, bits; test_gpu_device.py has the rest.

pytest -m gpu

TRITON_INTERPRET=1 before it tries these tests themselves on a CPU, but for bfloat16 and minutes of
large shapes.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch

from mcpo_kernels import Impl, linear_logprob, resolve, sequence_logprobs
from mcpo_kernels.linear_logprob.triton import tiles
from mcpo_kernels.testing import SHAPES, Case, Shape, assert_within_budget, evaluate, make_inputs

pytestmark = pytest.mark.gpu

# What models are trained in goes first: if time runs out, it ran.
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
IMPLS = ("triton", "chunked")
ALIGNED, RAGGED, *_ = SHAPES
LARGE = (
    # Every tile of every target ragged in each axis.
    Shape(1043, 577, 4099),
    # Many splits and slabs; a real vocabulary with an odd size.
    Shape(300, 768, 50257),
    # More programs than a device runs at once, and hidden sizes of large models.
    Shape(4096, 576, 49152),
    Shape(512, 4096, 32000),
    Shape(1, 8192, 128256),
)
HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "all": {"bias": True, "softcap": 30.0, "scale": 2.0},
    "bias": {"bias": True},
    "softcap": {"softcap": 5.0},
    "scale": {"scale": -0.3},
}
# Every kernel is compiled for every one of these: parts of a head in one dtype alone.
GRID = [
    *((torch.bfloat16, head) for head in HEADS),
    *((dtype, head) for dtype in (torch.float16, torch.float32) for head in ("plain", "all")),
]


def shape_id(shape: Shape) -> str:
    return f"N{shape.num_tokens}-D{shape.num_hidden}-V{shape.num_vocab}"


def on(device: torch.device, case: Case) -> Case:
    """The same case in the memory of a device."""
    moved = {
        field.name: value.to(device)
        for field in dataclasses.fields(case)
        if isinstance(value := getattr(case, field.name), torch.Tensor)
    }
    return dataclasses.replace(case, **moved)


def inputs(device: torch.device, shape: Shape, dtype: torch.dtype, **options: Any) -> Case:
    return on(device, make_inputs(shape, dtype, **options))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_auto_takes_the_kernel(device, dtype):
    assert resolve("auto", device, dtype).impl is Impl.TRITON


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
@pytest.mark.parametrize(("dtype", "head"), GRID, ids=str)
def test_value_and_gradients_within_budget(device, impl, dtype, shape, head):
    assert_within_budget(impl, inputs(device, shape, dtype, **HEADS[head]))


@pytest.mark.parametrize("head", ["plain", "all"])
@pytest.mark.parametrize("shape", LARGE, ids=shape_id)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_cases_within_budget(device, dtype, shape, head):
    assert_within_budget("triton", inputs(device, shape, dtype, **HEADS[head]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_filter_of_next_to_nothing_is_within_the_budget_of_the_whole(device, dtype):
    case = inputs(device, Shape(301, 64, 2503), dtype, **HEADS["all"])
    assert_within_budget("triton", case, filter_mass=1e-20)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_filter_leaves_out_what_has_no_mass(device, dtype):
    case = inputs(device, Shape(301, 64, 2503), dtype, bias=True)
    case.targets.remainder_(128)
    assert case.bias is not None
    case.bias[128:2048] -= 60.0
    exact, filtered = (evaluate("triton", case, filter_mass=mass) for mass in (0.0, 0.01))
    assert torch.equal(filtered.logp, exact.logp)
    assert filtered.dweight[128:2048].count_nonzero() == 0
    assert filtered.dweight[:128].count_nonzero() > 0


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_float32_products_at_a_lower_precision_within_their_budget(device, precision):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        assert_within_budget("triton", inputs(device, Shape(513, 640, 4099), torch.float32))
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_huge_logits_within_budget(device, dtype, sign):
    assert_within_budget("triton", inputs(device, RAGGED, dtype, peak=sign * 1e4))


def test_every_target_the_same(device):
    case = inputs(device, ALIGNED, torch.float32)
    case.targets.fill_(7)
    assert_within_budget("triton", case)


@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=3)), ids=str)
def test_every_subset_of_gradients(device, needs):
    case = inputs(device, Shape(65, 48, 700), torch.float32, bias=True)
    expected = evaluate("triton", case)[1:]
    assert case.bias is not None
    leaves = [case.hidden.clone(), case.weight.clone(), case.bias.clone()]
    for leaf, need in zip(leaves, needs, strict=True):
        leaf.requires_grad_(need)
    logp = linear_logprob(leaves[0], leaves[1], case.targets, bias=leaves[2], impl="triton")
    if any(needs):
        logp.backward(case.grad)
    for leaf, need, gradient in zip(leaves, needs, expected, strict=True):
        if need:
            assert torch.equal(leaf.grad, gradient)
        else:
            assert leaf.grad is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_poisoned_rows_without_gradient_do_not_spread(device, dtype):
    case = inputs(device, Shape(300, 96, 1200), dtype, bias=True)
    clean = evaluate("triton", case)
    poisoned_rows = case.grad == 0
    case.hidden[poisoned_rows] = torch.nan
    poisoned = evaluate("triton", case)
    assert poisoned.logp[poisoned_rows].isnan().all()
    assert torch.equal(poisoned.logp[~poisoned_rows], clean.logp[~poisoned_rows])
    for ours, expected in zip(poisoned[1:], clean[1:], strict=True):
        assert torch.equal(ours, expected)


def test_no_gradient_at_all(device):
    case = inputs(device, RAGGED, torch.bfloat16)
    case.grad.zero_()
    for gradient in evaluate("triton", case)[1:3]:
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_nan_in_nan_out(device):
    case = inputs(device, RAGGED, torch.float32)
    case.hidden[3, 2] = torch.nan
    logp = linear_logprob(case.hidden, case.weight, case.targets, impl="triton")
    assert logp.isnan().nonzero().squeeze(1).tolist() == [3]


def test_bias_of_minus_infinity_bans_a_whole_split(device):
    case = inputs(device, Shape(19, 16, 4099), torch.float32, bias=True)
    assert case.bias is not None
    case.bias[:2000] = -torch.inf
    case.targets.clamp_(min=2000)
    ours, exact = evaluate("triton", case), evaluate("reference", case.to(torch.float64))
    assert ours.dbias is not None
    for actual, expected in zip(ours, exact, strict=True):
        assert actual.isfinite().all()
        torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(ours.dbias[:2000], torch.zeros_like(ours.dbias[:2000]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_inputs(device, dtype):
    case = inputs(device, Shape(70, 96, 500), dtype)
    plain = linear_logprob(case.hidden, case.weight, case.targets, impl="triton")
    strided = case.hidden.repeat_interleave(2, 1)[:, ::2]
    assert torch.equal(linear_logprob(strided, case.weight, case.targets, impl="triton"), plain)
    turned = case.weight.T.clone().T
    assert torch.equal(linear_logprob(case.hidden, turned, case.targets, impl="triton"), plain)


@pytest.mark.parametrize("shape", [RAGGED, Shape(2048, 576, 49152)], ids=shape_id)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scoring_and_training_are_the_same_bits_every_time(device, dtype, shape):
    case = inputs(device, shape, dtype, bias=True)
    trained = evaluate("triton", case)
    with torch.no_grad():
        scored = linear_logprob(
            case.hidden, case.weight, case.targets, bias=case.bias, impl="triton"
        )
    assert torch.equal(scored, trained.logp)
    for _ in range(5):
        for first, second in zip(trained, evaluate("triton", case), strict=True):
            assert torch.equal(first, second)


@pytest.mark.parametrize("num_vocab", [1, 101, 4099, 50257])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_of_a_row_depend_on_nothing_but_the_row(device, dtype, num_vocab):
    case = inputs(device, Shape(301, 100, num_vocab), dtype, bias=True)
    everything = torch.arange(301, device=device)

    def score(rows: torch.Tensor) -> torch.Tensor:
        return linear_logprob(
            case.hidden[rows], case.weight, case.targets[rows], bias=case.bias, impl="triton"
        )

    together = score(everything)
    for rows in (everything[:1], everything[3:4], everything[5:22], everything.flip(0)):
        assert torch.equal(score(rows), together[rows])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_of_a_gradient_depend_on_nothing_but_the_row(device, dtype, monkeypatch):
    case = inputs(device, Shape(301, 100, 4099), dtype)
    whole = evaluate("triton", case)
    for rows in (slice(6, 7), slice(150, 301)):
        part = dataclasses.replace(
            case, hidden=case.hidden[rows], targets=case.targets[rows], grad=case.grad[rows]
        )
        assert torch.equal(evaluate("triton", part).dhidden, whole.dhidden[rows])
    # Slabs of the vocabulary, narrower.
    monkeypatch.setattr(tiles, "SCRATCH_MIB", 0)
    for ours, other in zip(evaluate("triton", case)[:3], whole[:3], strict=True):
        assert torch.equal(ours, other)


def test_sequence_sums(device):
    case = inputs(device, Shape(6, 5, 11), torch.float32)
    arguments = (case.hidden, case.weight, case.targets)
    seq_ids = torch.tensor([1, 1, 1, 4, 4, 6], device=device)
    sums = sequence_logprobs(*arguments, seq_ids, 9, impl="triton")
    rows = linear_logprob(*arguments, impl="triton").double()
    expected = torch.zeros(9, dtype=torch.float64, device=device).index_add(0, seq_ids, rows)
    assert torch.equal(sums, expected.float())


def test_float64_is_refused_and_auto_takes_another(device):
    case = inputs(device, RAGGED, torch.float64)
    with pytest.raises(RuntimeError, match="it takes bfloat16, float16 or float32"):
        linear_logprob(case.hidden, case.weight, case.targets, impl="triton")
    assert resolve("auto", device, torch.float64).impl is Impl.CHUNKED
