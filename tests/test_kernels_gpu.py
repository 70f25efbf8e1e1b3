"""The Triton kernels on a device: `pytest -m gpu`. Everything else about them is tested without."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mcpo_kernels import linear_logprob, resolve
from mcpo_kernels.linear_logprob.head import Allowance, Head, Needs, Saved
from mcpo_kernels.linear_logprob.triton import entry, tiles
from mcpo_kernels.testing import SHAPES, Case, Shape, assert_within_budget, evaluate, make_inputs

pytestmark = pytest.mark.gpu

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HEADS = {"plain": {}, "all": {"bias": True, "softcap": 30.0, "scale": 2.0}}
LARGE = Shape(1043, 576, 49157)


def on_device(case: Case, device: str = "cuda") -> Case:
    tensors = {
        name: getattr(case, name).to(device)
        for name in ("hidden", "weight", "targets", "grad", "bias")
        if getattr(case, name) is not None
    }
    return replace(case, **tensors)


def same_bits(first, second):
    return all(
        one is other or torch.equal(one, other) for one, other in zip(first, second, strict=True)
    )


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("shape", [*SHAPES, LARGE], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_value_and_gradients_within_budget(dtype, shape, head):
    assert_within_budget("triton", on_device(make_inputs(shape, dtype, **head)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_filter_of_next_to_nothing_is_within_the_budget_of_the_whole(dtype):
    case = on_device(make_inputs(Shape(301, 64, 2503), dtype, bias=True))
    assert_within_budget("triton", case, filter_mass=1e-20)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_depend_on_the_row_alone_and_repeat(dtype, monkeypatch):
    case = on_device(make_inputs(LARGE, dtype))
    whole = evaluate("triton", case)
    assert same_bits(whole, evaluate("triton", case))
    for rows in (slice(6, 7), slice(900, 1043)):
        part = replace(
            case, hidden=case.hidden[rows], targets=case.targets[rows], grad=case.grad[rows]
        )
        alone = evaluate("triton", part)
        assert torch.equal(alone.logp, whole.logp[rows])
        assert torch.equal(alone.dhidden, whole.dhidden[rows])
    monkeypatch.setattr(tiles, "SCRATCH_MIB", 8)
    assert same_bits(whole, evaluate("triton", case))


def test_rows_without_gradient_are_not_read():
    case = on_device(make_inputs(LARGE, torch.bfloat16, bias=True))
    clean = evaluate("triton", case)
    case.hidden[case.grad == 0] = torch.nan
    assert same_bits(evaluate("triton", case)[1:], clean[1:])


def test_a_graph_captures_the_backward_whatever_rows_have_gradient():
    case = on_device(make_inputs(LARGE, torch.bfloat16))
    head = Head(case.weight, None, None, 1.0)
    scores = entry.forward(case.hidden, case.targets, head, Allowance(0.0, 0.0))
    saved, needs = Saved(case.hidden, case.targets, scores), Needs(True, True, False)
    grad = torch.ones_like(case.grad)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        entry.backward(grad, saved, head, 0.0, needs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = entry.backward(grad, saved, head, 0.0, needs)
    for kept in (0, 1, 500):
        grad.zero_()
        grad[:kept] = 1.0
        graph.replay()
        assert same_bits(captured, entry.backward(grad, saved, head, 0.0, needs))


def test_a_device_that_is_not_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one device")
    case = make_inputs(Shape(301, 64, 2503), torch.bfloat16)
    with torch.cuda.device(0):
        second = evaluate("triton", on_device(case, "cuda:1"))
        first = evaluate("triton", on_device(case, "cuda:0"))
    assert same_bits([part.cpu() for part in second[:3]], [part.cpu() for part in first[:3]])


def test_auto_takes_triton():
    case = on_device(make_inputs(Shape(301, 64, 2503), torch.bfloat16))
    assert resolve("auto", case.hidden.device, torch.bfloat16).impl.value == "triton"
    arguments = (case.hidden, case.weight, case.targets)
    automatic, explicit = (linear_logprob(*arguments, impl=impl) for impl in ("auto", "triton"))
    assert torch.equal(automatic, explicit)
