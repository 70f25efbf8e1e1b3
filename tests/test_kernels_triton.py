"""The Triton kernels in Triton's interpreter, which decides at import whether it interprets.

So these tests and those of its neighbours run in a process of their own, started
by the first of them. By hand:

    TRITON_INTERPRET=1 python -m pytest -m interpret
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from torch.utils._python_dispatch import TorchDispatchMode

from mcpo_kernels import linear_logprob, sequence_logprobs
from mcpo_kernels.linear_logprob.triton import entry
from mcpo_kernels.testing import SHAPES, Shape, assert_within_budget, evaluate, make_inputs

if not entry.INSTALLED:
    pytest.skip("triton is not installed", allow_module_level=True)

import triton
import triton.language as tl

from mcpo_kernels.linear_logprob import ops
from mcpo_kernels.linear_logprob.triton import backward, forward, logits, tiles
from mcpo_kernels.linear_logprob.triton.launch import Launch
from mcpo_kernels.linear_logprob.triton.rows import rows_with_gradient
from mcpo_kernels.linear_logprob.triton.slab import slabs

interpreted = pytest.mark.interpret
# Lanes that are masked later, and rows whose logits are all -inf, make infinities on the way.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

DTYPES = (torch.float32, torch.float16)
RAGGED = SHAPES[1]
# Two blocks of rows, a prime vocabulary of four tiles.
SEVERAL = Shape(19, 8, 389)
HEADS = {"plain": {}, "all": {"bias": True, "softcap": 30.0, "scale": 2.0}}


def same_bits(first, second):
    return all(
        one is other or torch.equal(one, other) for one, other in zip(first, second, strict=True)
    )


def test_the_kernels_in_the_interpreter():
    files = [str(path) for path in Path(__file__).parent.glob("test_kernels_triton*.py")]
    arguments = ["-m", "interpret", "-q", "-x", *files]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("shape", SHAPES[:6], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@interpreted
def test_value_and_gradients_within_budget(dtype, shape, head):
    assert_within_budget("triton", make_inputs(shape, dtype, **head))


@pytest.mark.parametrize("head", [{"softcap": 5.0}, {"scale": -0.3, "bias": True}], ids=str)
@interpreted
def test_parts_of_a_head_within_budget(head):
    assert_within_budget("triton", make_inputs(RAGGED, torch.float32, **head))


@pytest.mark.parametrize("sign", [1.0, -1.0])
@interpreted
def test_huge_logits_within_budget(sign):
    assert_within_budget("triton", make_inputs(RAGGED, torch.float32, peak=sign * 1e4))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@interpreted
def test_several_blocks_splits_and_slabs_within_budget(dtype, narrow_slabs, monkeypatch):
    monkeypatch.setattr(forward, "MAX_SPLITS", 3)
    assert forward.number_of_splits(389, 128) == 2
    assert len(list(slabs(19, 389, dtype))) == 4
    assert_within_budget("triton", make_inputs(SEVERAL, dtype, **HEADS["all"]))


@interpreted
def test_the_width_of_slabs_changes_no_bit(narrow_slabs, monkeypatch):
    case = make_inputs(SEVERAL, torch.float32, bias=True)
    narrow = evaluate("triton", case)
    monkeypatch.setattr(tiles, "SCRATCH_MIB", 256)
    assert len(list(slabs(19, 389, torch.float32))) == 1
    assert same_bits(narrow, evaluate("triton", case))


@interpreted
def test_scoring_and_training_are_the_same_bits_every_time():
    case = make_inputs(SEVERAL, torch.float16, bias=True)
    first = evaluate("triton", case)
    with torch.no_grad():
        arguments = (case.hidden, case.weight, case.targets)
        assert torch.equal(linear_logprob(*arguments, bias=case.bias, impl="triton"), first.logp)
    assert same_bits(first, evaluate("triton", case))


@interpreted
def test_bits_of_a_row_depend_on_nothing_but_the_row():
    case = make_inputs(SEVERAL, torch.float32)

    def value_and_gradient(rows):
        hidden = case.hidden[rows].requires_grad_()
        logp = linear_logprob(hidden, case.weight, case.targets[rows], impl="triton")
        return logp, torch.autograd.grad(logp, hidden, case.grad[rows])[0]

    together = value_and_gradient(torch.arange(19))
    for rows in (torch.arange(4, 5), torch.arange(18, 1, -1)):
        logp, dhidden = value_and_gradient(rows)
        assert torch.equal(logp, together[0][rows])
        assert torch.equal(dhidden, together[1][rows])


@pytest.mark.parametrize("filter_mass", [0.0, 0.1])
@interpreted
def test_poisoned_rows_without_gradient_do_not_spread(filter_mass):
    case = make_inputs(RAGGED, torch.float32, bias=True)
    clean = evaluate("triton", case, filter_mass=filter_mass)
    poisoned_rows = case.grad == 0
    case.hidden[poisoned_rows] = torch.nan
    poisoned = evaluate("triton", case, filter_mass=filter_mass)
    assert poisoned.logp[poisoned_rows].isnan().all()
    assert torch.equal(poisoned.logp[~poisoned_rows], clean.logp[~poisoned_rows])
    assert same_bits(poisoned[1:], clean[1:])


@pytest.mark.parametrize(("rows", "count"), [([], 0), ([3], 1), (range(17), 17)])
@interpreted
def test_rows_with_gradient_are_put_in_front(rows, count):
    case = make_inputs(RAGGED, torch.float32)
    grad = torch.zeros(17)
    grad[list(rows)] = torch.tensor([torch.nan, *[-1.0] * 16])[:count]
    logp, lse, *kept = ops.linear_logprob(
        case.hidden, case.weight, case.targets, None, None, 1.0, 0.0, 0.0, "triton"
    )
    saved = backward.Saved(case.hidden, case.targets, ops.Scores(logp, lse, *kept))
    found = rows_with_gradient(grad, saved)
    assert found.count_1.tolist() == [count]
    assert found.row_N[:count].tolist() == list(rows)
    assert torch.equal(found.hidden_ND[:count], case.hidden[list(rows)])
    assert torch.equal(found.number_N3[:count, 0], lse[list(rows)])


@interpreted
def test_no_gradient_at_all():
    case = make_inputs(RAGGED, torch.float32, bias=True)
    case.grad.zero_()
    for gradient in evaluate("triton", case)[1:]:
        assert torch.equal(gradient, torch.zeros_like(gradient))


@interpreted
def test_nan_in_nan_out():
    case = make_inputs(RAGGED, torch.float32, softcap=3.0)
    case.hidden[3, 2] = torch.nan
    case.grad[3] = 1.0
    result = evaluate("triton", case)
    assert result.logp.isnan().nonzero().squeeze(1).tolist() == [3]
    assert result.dhidden.isnan().any(1).nonzero().squeeze(1).tolist() == [3]
    assert result.dweight.isnan().all()
    case.weight[100] = torch.nan
    assert linear_logprob(case.hidden, case.weight, case.targets, impl="triton").isnan().all()


@interpreted
def test_bias_of_minus_infinity_bans_whole_tiles():
    case = make_inputs(SEVERAL, torch.float32, bias=True)
    case.bias[:260] = -torch.inf
    case.targets.clamp_(min=260)
    ours, exact = evaluate("triton", case), evaluate("reference", case)
    for actual, expected in zip(ours, exact, strict=True):
        assert actual.isfinite().all()
        torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5)
    case.bias[:] = -torch.inf
    logp = linear_logprob(case.hidden, case.weight, case.targets, bias=case.bias, impl="triton")
    assert logp.isnan().all()


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
@interpreted
def test_a_gradient_nobody_needs_is_not_computed_and_changes_no_bit(frozen, monkeypatch):
    case = make_inputs(RAGGED, torch.float32)
    both = evaluate("triton", case)
    unneeded = {"hidden": "add_to_dhidden", "weight": "write_dweight"}[frozen]
    monkeypatch.delattr(backward, unneeded)
    leaf = case.weight if frozen == "hidden" else case.hidden
    leaf.requires_grad_()
    logp = linear_logprob(case.hidden, case.weight, case.targets, impl="triton")
    logp.backward(case.grad)
    assert torch.equal(leaf.grad, both.dweight if frozen == "hidden" else both.dhidden)


@interpreted
def test_the_bias_alone():
    case = make_inputs(RAGGED, torch.float32, bias=True)
    both = evaluate("triton", case)
    bias = case.bias.requires_grad_()
    logp = linear_logprob(case.hidden, case.weight, case.targets, bias=bias, impl="triton")
    logp.backward(case.grad)
    assert torch.equal(bias.grad, both.dbias)


@interpreted
def test_strided_inputs():
    case = make_inputs(RAGGED, torch.float32)
    plain = evaluate("triton", case)
    wide = case.hidden.repeat_interleave(2, 1)[:, ::2].requires_grad_()
    turned = case.weight.T.clone().T.requires_grad_()
    logp = linear_logprob(wide, turned, case.targets, impl="triton")
    assert torch.equal(logp, plain.logp)
    dhidden, dweight = torch.autograd.grad(logp, (wide, turned), case.grad)
    assert torch.equal(dhidden, plain.dhidden)
    assert torch.equal(dweight, plain.dweight)
    assert dweight.is_contiguous()


class NoNumberAsked(TorchDispatchMode):
    """Refuses what would wait for a device: reading a value, and shapes that depend on values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "unique")
        assert not any(name in str(func) for name in waits), func
        return func(*args, **(kwargs or {}))


@interpreted
def test_the_backward_asks_the_device_for_no_number():
    case = make_inputs(RAGGED, torch.float32, bias=True)
    hidden = case.hidden.requires_grad_()
    for filter_mass in (0.0, 0.1):
        logp = linear_logprob(
            hidden, case.weight, case.targets, filter_mass=filter_mass, impl="triton"
        )
        with NoNumberAsked():
            logp.backward(case.grad)
    with pytest.raises(AssertionError, match="nonzero"), NoNumberAsked():
        case.grad.nonzero()


# The op.


@interpreted
def test_opcheck():
    case = make_inputs(Shape(7, 5, 150), torch.float32, bias=True)
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_()
    arguments = (hidden, weight, case.targets, case.bias, 4.0, 0.7, 1.0, 0.1, "triton")
    torch.library.opcheck(torch.ops.mcpo.linear_logprob.default, arguments)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@interpreted
def test_compile_traces_forward_and_backward_whole():
    case = make_inputs(Shape(7, 5, 150), torch.float32)
    seq_ids = torch.tensor([0, 0, 1, 1, 3, 3, 3])

    def gradient(function):
        hidden = case.hidden.clone().requires_grad_()
        return torch.autograd.grad(function(hidden * 2), hidden)[0]

    def loss(hidden):
        sums = sequence_logprobs(hidden, case.weight, case.targets, seq_ids, 5, impl="triton")
        return (sums * sums).sum()

    torch.compiler.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    assert torch.equal(gradient(loss), gradient(compiled))


# What the kernels share.


@triton.jit
def starts_kernel(result_ptr, first, length, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(result_ptr + offs, logits.starts(first + offs, length))


@interpreted
def test_addresses_beyond_32_bits():
    result = torch.zeros(16, dtype=torch.int64)
    starts_kernel[(1,)](result, 2**20, 2**20, BLOCK=16)
    assert result.tolist() == [(2**20 + row) * 2**20 for row in range(16)]


def test_no_kernel_multiplies_by_the_length_of_a_row_itself():
    """Only ``starts`` does, in 64 bits."""
    lengths = {"num_hidden", "num_tokens", "num_panels", "length"}
    products = 0
    for path in Path(logits.__file__).parent.glob("*.py"):
        for function in ast.walk(ast.parse(path.read_text())):
            kernel = isinstance(function, ast.FunctionDef) and "jit" in "".join(
                ast.unparse(mark) for mark in function.decorator_list
            )
            if not kernel or function.name == "starts":
                continue
            for node in ast.walk(function):
                if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
                    names = {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}
                    assert not names & lengths, f"{path.name}: {ast.unparse(node)}"
                    products += 1
    assert products > 10


def test_no_kernel_takes_more_than_twelve_arguments_at_run_time():
    """What a reader can hold, and registers."""
    counts: dict[str, int] = {}
    for path in Path(logits.__file__).parent.glob("*.py"):
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef) and function.name.endswith("_kernel"):
                arguments = function.args.args
                counts[function.name] = sum(each.annotation is None for each in arguments)
    assert len(counts) == 8
    assert max(counts.values()) <= 12, counts


@triton.jit
def pair_kernel(result_ptr, num_first, num_second, GROUP: tl.constexpr):
    first, second = logits.block_pair(tl.program_id(0), num_first, num_second, GROUP)
    tl.store(result_ptr + 2 * tl.program_id(0), first)
    tl.store(result_ptr + 2 * tl.program_id(0) + 1, second)


@pytest.mark.parametrize("group", [1, 3, 8])
@pytest.mark.parametrize("blocks", [(1, 1), (8, 2), (9, 3), (2, 5)], ids=str)
@interpreted
def test_every_pair_of_blocks_has_one_program(blocks, group):
    first, second = blocks
    result = torch.full((first * second, 2), -1)
    pair_kernel[(first * second,)](result, first, second, GROUP=group)
    pairs = [tuple(pair) for pair in result.tolist()]
    assert sorted(pairs) == [(one, other) for one in range(first) for other in range(second)]
    # A group goes through all of the second axis before the next begins.
    assert {pair[0] for pair in pairs[: second * min(group, first)]} == set(
        range(min(group, first))
    )


@triton.jit
def tanh_kernel(x_ptr, result_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(result_ptr + offs, logits.tanh(tl.load(x_ptr + offs)))


@interpreted
def test_tanh_is_within_two_units_in_the_last_place():
    """Half a unit each for exp (doubled by its argument), sum, quotient and difference."""
    x = torch.cat([torch.linspace(-12, 12, 4096), torch.logspace(-30, 1, 4096)])
    result = torch.empty_like(x)
    tanh_kernel[(1,)](x, result, BLOCK=8192)
    exact = x.double().tanh()
    unit = torch.finfo(torch.float32).eps
    assert ((result - exact).abs() <= 2 * unit * exact.abs()).all()
    special = torch.tensor([0.0, -torch.inf, torch.inf, torch.nan])
    result = torch.empty_like(special)
    tanh_kernel[(1,)](special, result, BLOCK=4)
    assert torch.equal(result[:3], torch.tensor([0.0, -1.0, 1.0]))
    assert result[3].isnan()


@interpreted
def test_the_interpreter_has_tiles_of_its_own_and_multiplies_exactly():
    torch.set_float32_matmul_precision("medium")
    try:
        assert Launch.of(torch.zeros(1, 1))[:3] == ("interpreter", "fp32", "ieee")
    finally:
        torch.set_float32_matmul_precision("highest")
