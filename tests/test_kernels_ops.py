from __future__ import annotations

import pytest
import torch
from conftest import FUSED
from torch._subclasses.fake_tensor import FakeTensorMode

from mcpo_kernels import linear_logprob, sequence_logprobs
from mcpo_kernels.linear_logprob import ops
from mcpo_kernels.testing import Shape, make_inputs

# Three panels of the vocabulary, so that there is something to leave out.
SHAPE = Shape(7, 5, 150)
SEQ_IDS = torch.tensor([0, 0, 1, 1, 3, 3, 3])
DTYPES = (torch.float64, torch.bfloat16)


def leaves(dtype=torch.float64, *, bias=True):
    case = make_inputs(SHAPE, dtype, bias=bias)
    tensors = (case.hidden, case.weight, case.bias)
    return [tensor for tensor in tensors if tensor is not None], case


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", FUSED)
def test_opcheck_of_the_forward(impl, dtype, bias, softcap):
    _, case = leaves(dtype, bias=bias)
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_()
    for cache_mb, filter_mass in ((0.0, 0.0), (1.0, 0.1)):
        options = (softcap, 0.7, cache_mb, filter_mass, impl)
        arguments = (hidden, weight, case.targets, case.bias, *options)
        torch.library.opcheck(torch.ops.mcpo.linear_logprob.default, arguments)


@pytest.mark.parametrize("needs", [[True, True, True], [True, False, False], [False, True, False]])
@pytest.mark.parametrize("impl", FUSED)
def test_opcheck_of_the_backward(impl, needs):
    _, case = leaves()
    scores = ops.linear_logprob(
        case.hidden, case.weight, case.targets, case.bias, 4.0, 0.7, 1.0, 0.1, impl
    )
    saved = (case.hidden, case.weight, case.targets, case.bias, *scores)
    arguments = (case.grad, *saved, 4.0, 0.7, 0.1, needs, impl)
    torch.library.opcheck(torch.ops.mcpo.linear_logprob_backward.default, arguments)


def test_opcheck_of_the_segment_sum():
    values = torch.randn(7, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(torch.ops.mcpo.segment_sum.default, (values, SEQ_IDS, 5))


@pytest.mark.parametrize("impl", FUSED)
def test_lse_is_that_of_the_logits_and_not_differentiable(impl):
    _, case = leaves()
    hidden = case.hidden.requires_grad_()
    logp, lse, *_ = ops.linear_logprob(
        hidden, case.weight, case.targets, case.bias, None, 1.0, 0.0, 0.0, impl
    )
    logits = hidden @ case.weight.T + case.bias
    torch.testing.assert_close(lse, logits.logsumexp(1).detach(), rtol=1e-14, atol=1e-14)
    assert logp.requires_grad
    assert not lse.requires_grad


# What torch itself says of its own backward while AOTAutograd traces it.
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("allowance", [{}, {"cache_mb": 1.0, "filter_mass": 0.1}])
@pytest.mark.parametrize("frozen_head", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", ["auto", *FUSED])
def test_compile_traces_forward_and_backward_whole(impl, dtype, frozen_head, allowance):
    head = {"softcap": 4.0, "scale": 0.7, "impl": impl} | allowance

    def loss(hidden, weight, bias, targets):
        sums = sequence_logprobs(hidden * 2, weight, targets, SEQ_IDS, 5, bias=bias, **head)
        return (sums * sums).sum()

    torch.compiler.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    results = []
    for function in (loss, compiled):
        tensors, case = leaves(dtype)
        for tensor in tensors if not frozen_head else tensors[:1]:
            tensor.requires_grad_()
        value = function(*tensors, case.targets)
        value.backward()
        results.append([value.detach(), *(tensor.grad for tensor in tensors)])
    for eager, traced in zip(*results, strict=True):
        assert (eager is None and traced is None) or torch.equal(eager, traced)


def test_fake_tensors_flow_through():
    with FakeTensorMode():
        hidden = torch.empty(7, 5, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(11, 5, dtype=torch.bfloat16, requires_grad=True)
        index = torch.empty(7, dtype=torch.int64)
        sums = sequence_logprobs(hidden, weight, index, index, 3)
        sums.sum().backward()
    assert sums.shape == (3,)
    assert sums.dtype == torch.float32
    assert hidden.grad.shape == (7, 5)
    assert weight.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("impl", FUSED)
def test_a_graph_can_be_kept(impl):
    (hidden, *_), case = leaves()
    hidden.requires_grad_()
    total = linear_logprob(hidden, case.weight, case.targets, impl=impl).sum()
    total.backward(retain_graph=True)
    once = hidden.grad.clone()
    total.backward()
    assert torch.equal(hidden.grad, 2 * once)


@pytest.mark.parametrize("impl", FUSED)
def test_second_derivative_is_refused(impl):
    (hidden, *_), case = leaves()
    hidden.requires_grad_()
    total = linear_logprob(hidden, case.weight, case.targets, impl=impl).sum()
    (first,) = torch.autograd.grad(total, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once; use impl='reference'"):
        first.sum().backward()


def test_second_derivative_of_the_reference():
    _, case = leaves(bias=False)

    def score(hidden):
        return linear_logprob(hidden, case.weight, case.targets, impl="reference")

    assert torch.autograd.gradgradcheck(score, case.hidden.requires_grad_())


@pytest.mark.parametrize("backward_too", [False, True])
@pytest.mark.parametrize("impl", FUSED)
def test_autocast_does_not_round_the_logits(impl, backward_too):
    def results(forward_autocast, backward_autocast):
        tensors, case = leaves(torch.float32)
        hidden, weight, bias = (tensor.requires_grad_() for tensor in tensors)
        with torch.autocast("cpu", torch.bfloat16, enabled=forward_autocast):
            logp = linear_logprob(hidden, weight, case.targets, bias=bias, impl=impl)
        with torch.autocast("cpu", torch.bfloat16, enabled=backward_autocast):
            logp.backward(case.grad)
        return [logp.detach(), hidden.grad, weight.grad, bias.grad]

    for ours, expected in zip(results(True, backward_too), results(False, False), strict=True):
        assert torch.equal(ours, expected)
