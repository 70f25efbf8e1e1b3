"""What holds of the compiled head alone; what it shares with others is tested with them."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from mcpo_kernels import linear_logprob
from mcpo_kernels.linear_logprob import cpu
from mcpo_kernels.linear_logprob.head import Allowance, Head, Needs, Saved, empty_kept
from mcpo_kernels.testing import SHAPES, Shape, assert_within_budget, evaluate, make_inputs

pytestmark = pytest.mark.skipif(not cpu.AVAILABLE, reason=cpu.REASON)

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
PLAIN = Allowance(cache_mb=0.0, filter_mass=0.0)
# Several parts and slabs of the vocabulary, several tiles of rows, an odd hidden size.
LARGE = Shape(301, 131, 5003)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_tiles_within_budget(dtype, portable, monkeypatch):
    monkeypatch.setattr(cpu, "PORTABLE", portable)
    assert_within_budget("cpu", make_inputs(LARGE, dtype, bias=True, softcap=30.0))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products_of_our_own_within_budget(dtype, shape, monkeypatch):
    monkeypatch.setattr(cpu, "PORTABLE", True)
    assert_within_budget("cpu", make_inputs(shape, dtype, bias=True, softcap=30.0, scale=2.0))


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_number_of_threads_changes_no_bit(dtype, portable, monkeypatch):
    monkeypatch.setattr(cpu, "PORTABLE", portable)
    case = make_inputs(LARGE, dtype, bias=True)
    results = []
    for count in (1, 2, 5):
        with threads(count):
            results.append(evaluate("cpu", case))
    for other in results[1:]:
        for first, second in zip(results[0], other, strict=True):
            assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_a_row_depends_on_nothing_but_the_row(dtype):
    case = make_inputs(LARGE, dtype)

    def gradient(rows):
        hidden = case.hidden[rows].requires_grad_()
        logp = linear_logprob(hidden, case.weight, case.targets[rows], impl="cpu")
        return torch.autograd.grad(logp, hidden, case.grad[rows])[0]

    together = gradient(torch.arange(301))
    for rows in (torch.arange(1, 2), torch.arange(150, 290)):
        assert torch.equal(gradient(rows), together[rows])


def test_forward_and_backward_do_not_write_to_their_inputs():
    case = make_inputs(LARGE, torch.bfloat16, bias=True)
    before = [tensor.clone() for tensor in (case.hidden, case.weight, case.bias, case.grad)]
    evaluate("cpu", case)
    for tensor, copy in zip((case.hidden, case.weight, case.bias, case.grad), before, strict=True):
        assert torch.equal(tensor, copy)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_frozen_head_gives_the_same_bits_of_the_other_gradient(dtype):
    case = make_inputs(LARGE, dtype)
    head = Head(case.weight, None, None, 1.0)
    saved = Saved(case.hidden, case.targets, cpu.forward(case.hidden, case.targets, head, PLAIN))
    both = cpu.backward(case.grad, saved, head, 0.0, Needs(True, True, False))
    hidden_alone = cpu.backward(case.grad, saved, head, 0.0, Needs(True, False, False))
    weight_alone = cpu.backward(case.grad, saved, head, 0.0, Needs(False, True, False))
    assert hidden_alone.weight_VD is None
    assert torch.equal(hidden_alone.hidden_ND, both.hidden_ND)
    assert torch.equal(weight_alone.weight_VD, both.weight_VD)


def test_a_weight_with_strided_rows_is_read_in_place():
    case = make_inputs(LARGE, torch.bfloat16)
    wide = torch.cat([case.weight, torch.full_like(case.weight, torch.nan)], dim=1)
    strided = linear_logprob(case.hidden, wide[:, :131], case.targets, impl="cpu")
    assert torch.equal(strided, linear_logprob(case.hidden, case.weight, case.targets, impl="cpu"))


def test_exponential_and_tangent_are_those_of_the_oracle():
    # Each row has one other logit far from its target's, so logp is a single exponential.
    gap = torch.linspace(-80, 20, 4096, dtype=torch.float64)
    hidden, weight = gap.float()[:, None], torch.tensor([[1.0], [0.0]])
    targets = torch.ones(4096, dtype=torch.int64)
    logp = linear_logprob(hidden, weight, targets, impl="cpu")
    exact = torch.nn.functional.logsigmoid(-hidden.double()[:, 0])
    torch.testing.assert_close(logp.double(), exact, rtol=3e-7, atol=1.2e-7)
    capped = linear_logprob(hidden / 20, weight, targets, softcap=1.0, impl="cpu")
    exact = torch.nn.functional.logsigmoid(-torch.tanh((hidden / 20).double()[:, 0]))
    torch.testing.assert_close(capped.double(), exact, rtol=3e-7, atol=1.2e-7)


@pytest.mark.parametrize(("tokens", "part"), [(6, 2), (3, 1)])
def test_a_backward_costs_what_its_rows_cost(tokens, part):
    """CPU time of a backward of part of the rows, against that of all, at the same memory."""
    num_rows = 256 * tokens
    case = make_inputs(Shape(num_rows, 256, 8192), torch.bfloat16)
    head = Head(case.weight, None, None, 1.0)
    saved = Saved(case.hidden, case.targets, cpu.forward(case.hidden, case.targets, head, PLAIN))
    grad = torch.ones(num_rows)
    some = grad.clone()
    some[256 * part :] = 0.0
    seconds = {name: cpu_seconds(g, saved, head) for name, g in (("all", grad), ("some", some))}
    # A third of the rows; packing and writing the weight do not shrink with them.
    assert seconds["some"] < 0.6 * seconds["all"]


def cpu_seconds(grad: torch.Tensor, saved: Saved, head: Head) -> float:
    taken: list[float] = []
    for _ in range(5):
        began = time.process_time()
        cpu.backward(grad, saved, head, 0.0, Needs(True, True, False))
        taken.append(time.process_time() - began)
    return min(taken)


def test_memory_beyond_the_results_is_bounded():
    """A backward whose logits would take 250 MB: what the process grows by, gradients aside."""
    status = Path("/proc/self/clear_refs")
    if not status.exists():
        pytest.skip("needs /proc to measure the memory of this process")
    case = make_inputs(Shape(1024, 64, 60000), torch.float32)
    case.grad.fill_(1.0)
    head = Head(case.weight, None, None, 1.0)
    saved = Saved(case.hidden, case.targets, cpu.forward(case.hidden, case.targets, head, PLAIN))
    gradients = cpu.backward(case.grad, saved, head, 0.0, Needs(True, True, False))
    held = sum(gradient.nbytes for gradient in gradients if gradient is not None)
    del gradients
    # What earlier calls left to the allocator would hide what this one needs.
    ctypes.CDLL(None).malloc_trim(0)
    status.write_text("5")
    before = memory("VmRSS")
    cpu.backward(case.grad, saved, head, 0.0, Needs(True, True, False))
    assert memory("VmHWM") - before - held < 24 * 2**20


def memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


WRONG = {
    "hidden must be": {"hidden_ND": torch.zeros(4, 5)},
    "targets must be": {"target_N": torch.zeros(3, dtype=torch.int64)},
    "weight and bias must have the dtype": {"weight_VD": torch.zeros(8, 6).double()},
    "bias must be": {"bias_V": torch.zeros(7)},
    "grad, logp and lse must be": {"grad_N": torch.zeros(2)},
}


@pytest.mark.parametrize(("message", "changes"), WRONG.items(), ids=WRONG)
def test_the_ops_themselves_check_what_they_would_read(message, changes):
    arguments = {
        "grad_N": torch.zeros(4),
        "hidden_ND": torch.zeros(4, 6),
        "weight_VD": torch.zeros(8, 6),
        "target_N": torch.zeros(4, dtype=torch.int64),
        "bias_V": torch.zeros(8),
    } | changes
    logp, kept = torch.zeros(4), empty_kept(torch.zeros(4, 6))
    end = (None, 1.0, 0.0, True, True, True, False)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.mcpo_cpu.backward(*arguments.values(), logp, logp, *kept, *end)


def test_agrees_with_portable_torch():
    case = make_inputs(LARGE, torch.float64, bias=True, softcap=20.0, scale=1.5)
    for ours, theirs in zip(evaluate("cpu", case), evaluate("chunked", case), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
