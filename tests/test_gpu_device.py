"""What only a CUDA device can show of the head: graphs, streams, memory, large addresses, a run.

pytest -m gpu
"""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import words
from test_gpu_head import DTYPES, inputs

from mcpo.train import main
from mcpo_kernels import linear_logprob
from mcpo_kernels.testing import Case, Results, Shape, evaluate

pytestmark = pytest.mark.gpu

GIB = 2**30
STEP = Shape(515, 384, 8200)


def step(case: Case) -> tuple[torch.Tensor, ...]:
    """A forward and a backward that only enqueue work."""
    hidden, weight = case.hidden.detach().requires_grad_(), case.weight.detach().requires_grad_()
    logp = linear_logprob(hidden, weight, case.targets, impl="triton")
    return (logp.detach(), *torch.autograd.grad(logp, (hidden, weight), case.grad))


def assert_same(first: tuple[torch.Tensor, ...], second: tuple[torch.Tensor, ...]) -> None:
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


def needs_memory(device: torch.device, gib: float) -> None:
    # What torch holds for tensors to come is free too.
    gc.collect()
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info(device)[0] / GIB
    if free < gib:
        pytest.skip(f"needs {gib:.0f} GiB of free device memory, found {free:.0f}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_cuda_graph_of_forward_and_backward(device, dtype):
    case, other = (inputs(device, STEP, dtype, seed=seed) for seed in (0, 1))
    # Which rows have gradient changes with the input, and the graph must not know.
    other.grad[::2] = 0.0
    expected = step(other)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(case)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(case)
    for name in ("hidden", "weight", "targets", "grad"):
        getattr(case, name).copy_(getattr(other, name))
    for _ in range(2):
        graph.replay()
        torch.cuda.synchronize()
        assert_same(captured, expected)
    for kept in (0, 1, len(case.grad)):
        case.grad.zero_()
        case.grad[:kept] = 1.0
        graph.replay()
        torch.cuda.synchronize()
        assert_same(captured, step(case))


def test_nothing_waits_for_the_device(device):
    case = inputs(device, STEP, torch.bfloat16)
    step(case)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(case)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_stream_that_is_not_the_default_one(device):
    case = inputs(device, STEP, torch.bfloat16)
    expected = step(case)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        found = step(case)
    side.synchronize()
    assert_same(found, expected)


def test_a_device_that_is_not_the_current_one(device):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two devices")
    second = torch.device("cuda", 1)
    assert torch.cuda.current_device() == 0
    expected = step(inputs(device, STEP, torch.bfloat16))
    found = step(inputs(second, STEP, torch.bfloat16))
    assert {tensor.device for tensor in found} == {second}
    assert torch.cuda.current_device() == 0
    assert_same(tuple(tensor.to(device) for tensor in found), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torch_compile_without_a_break(device, dtype):
    case = inputs(device, Shape(65, 96, 1030), dtype)

    def score(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return linear_logprob(hidden, weight, case.targets, impl="triton") * 2.0

    def run(function: Callable[..., torch.Tensor]) -> tuple[torch.Tensor, ...]:
        hidden, weight = (leaf.detach().requires_grad_() for leaf in (case.hidden, case.weight))
        value = function(hidden, weight)
        return (value.detach(), *torch.autograd.grad(value, (hidden, weight), case.grad))

    assert_same(run(torch.compile(score, fullgraph=True)), run(score))


def peak_bytes(job: Callable[[], object]) -> int:
    """Device memory beyond what was held before, in a warm call."""
    job()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = job()
    torch.cuda.synchronize()
    found = torch.cuda.max_memory_allocated() - before
    del result
    return found


def test_the_logits_never_exist(device):
    case = inputs(device, Shape(8192, 256, 65536), torch.bfloat16)
    logits = 8192 * 65536 * 2

    def score() -> torch.Tensor:
        with torch.no_grad():
            return linear_logprob(case.hidden, case.weight, case.targets, impl="triton")

    # Partial results: three floats for each row and split, of which there are at most 128.
    assert peak_bytes(score) <= 3 * 128 * 8192 * 4 + 2**20
    # docs/triton.md: scratch of 256 MiB, rows once more, dhidden in float32, and the gradients.
    results = 2 * (case.hidden.numel() + case.weight.numel())
    rows = case.hidden.numel() * (2 + 4) + 8192 * 128
    bound = 2**28 + rows + results + 3 * 128 * 8192 * 4 + 2**24
    assert peak_bytes(lambda: step(case)) <= bound < logits


# Large addresses. Only few rows have gradient, so the exact answer needs few rows.


def logp_of(case: Case, rows: torch.Tensor, dtype: torch.dtype, slab: int = 8192) -> torch.Tensor:
    """Of some rows: in float64, or with the device's own products of 16 bits in float32."""

    def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        if dtype == torch.float64:
            return left.double() @ right.double().T
        return torch.mm(left, right.T, out_dtype=dtype)

    hidden, targets = case.hidden[rows], case.targets[rows]
    total = torch.full((len(rows),), -math.inf, dtype=dtype, device=rows.device)
    for weight in case.weight.split(slab):
        total = torch.logaddexp(total, product(hidden, weight).logsumexp(1))
    return product(hidden, case.weight[targets]).diagonal() - total


def exact(case: Case, rows: torch.Tensor, slab: int = 8192) -> Results:
    """In float64, one slab of the vocabulary at a time; only these rows have gradient."""
    hidden, grad = case.hidden[rows].double(), case.grad[rows].double()
    targets = case.targets[rows]
    logp = logp_of(case, rows, torch.float64)
    total = (hidden * case.weight[targets].double()).sum(1) - logp
    dhidden, dweight = torch.zeros_like(hidden), torch.empty_like(case.weight)
    for number, weight in enumerate(case.weight.split(slab)):
        columns = torch.arange(number * slab, number * slab + len(weight), device=rows.device)
        p = (hidden @ weight.double().T - total[:, None]).exp()
        dz = grad[:, None] * ((targets[:, None] == columns).double() - p)
        dhidden += dz @ weight.double()
        dweight[columns] = (dz.T @ hidden).to(dweight.dtype)
    return Results(logp, dhidden, dweight, None)


def assert_near(ours: torch.Tensor, expected: torch.Tensor) -> None:
    """Logit gradients and result are rounded, to 2 ** -8 each; the budgets allow that twice."""
    error = (ours.double() - expected.double()).norm()
    assert error <= 4 * 2**-8 * expected.double().norm()


def large_case(device: torch.device, shape: Shape, rows: torch.Tensor) -> Case:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        made = torch.empty(size, dtype=torch.bfloat16, device=device)
        return made.normal_(generator=generator)

    num_tokens, num_hidden, num_vocab = shape
    grad = torch.zeros(num_tokens, device=device)
    grad[rows] = torch.linspace(0.5, 1.0, len(rows), device=device)
    return Case(
        hidden=normal(num_tokens, num_hidden),
        weight=normal(num_vocab, num_hidden).mul_(3 / num_hidden**0.5),
        # The last ones, whose addresses are largest.
        targets=num_vocab - 1 - torch.arange(num_tokens, device=device) % min(num_vocab, 100),
        grad=grad,
    )


@pytest.mark.parametrize(
    ("shape", "gib"),
    [
        pytest.param(Shape(64, 8448, 262144), 40, id="weight"),
        pytest.param(Shape(2**19 + 64, 4224, 256), 24, id="hidden"),
        pytest.param(Shape(2**17, 64, 2**15), 8, id="logits"),
    ],
)
def test_more_than_two_to_the_31_numbers(device, shape, gib):
    needs_memory(device, gib)
    num_tokens, num_hidden, num_vocab = shape
    products = (num_vocab * num_hidden, num_tokens * num_hidden, num_tokens * num_vocab)
    assert max(products) >= 2**31
    rows = torch.arange(num_tokens - 64, num_tokens, device=device)
    case = large_case(device, shape, rows)
    ours, expected = Results(*step(case), None), exact(case, rows)
    # The budget of mcpo_kernels/testing.py.
    naive = (logp_of(case, rows, torch.float32) - expected.logp).abs().max()
    largest = (case.hidden[rows].abs().float() @ case.weight[-8192:].abs().float().T).max()
    band = torch.finfo(torch.float32).eps * (largest + math.log(num_vocab))
    assert (ours.logp[rows] - expected.logp).abs().max() <= 2 * naive + band
    assert_near(ours.dhidden[rows], expected.dhidden)
    assert not ours.dhidden[: num_tokens - 64].any()
    for found, wanted in zip(ours.dweight.split(8192), expected.dweight.split(8192), strict=True):
        assert_near(found, wanted)


# The trainer.


def test_a_run_trains_on_the_device(device, arguments: dict[str, Any]) -> None:
    assert main(words(arguments | {"device": "cuda", "bf16": "true"})) == 0
    summary = json.loads((arguments["output_dir"] / "summary.json").read_text())
    assert summary["steps"] == 8
    lines = [
        json.loads(line)
        for line in (arguments["output_dir"] / "metrics.jsonl").read_text().splitlines()
    ]
    assert all(math.isfinite(line["loss"]) for line in lines)
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_the_oracle_runs_on_the_device(device):
    case = inputs(device, Shape(33, 16, 70), torch.float32)
    for ours, expected in zip(
        evaluate("reference", case.to(torch.float64))[:3],
        evaluate("reference", inputs(torch.device("cpu"), Shape(33, 16, 70), torch.float64))[:3],
        strict=True,
    ):
        torch.testing.assert_close(ours.cpu(), expected, rtol=1e-6, atol=1e-6)
