"""The gate in front of the timings: its oracle is right, and it refuses what is wrong."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from benchmarks import gate, peers
from benchmarks.cells import DTYPES, ONE_PASS, TWO_PASSES, Shape
from benchmarks.workload import Inputs, Results, make_inputs, make_job, train

SHAPE = Shape(48, 32, 500)


@pytest.fixture(params=DTYPES)
def inputs(request: pytest.FixtureRequest) -> Inputs:
    return make_inputs(SHAPE, request.param)


def check(results: Results, inputs: Inputs, grad_N: Tensor | None = None) -> gate.Errors:
    upstream = inputs.grad_N if grad_N is None else grad_N
    return gate.check(results, gate.make_oracle(inputs), inputs, upstream, "it")


def in_float64(inputs: Inputs) -> Inputs:
    def leaf(tensor: Tensor) -> Tensor:
        return tensor.detach().double().requires_grad_()

    return dataclasses.replace(
        inputs, hidden_ND=leaf(inputs.hidden_ND), weight_VD=leaf(inputs.weight_VD)
    )


def exact_head(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logps = (hidden.double() @ weight.double().T).log_softmax(1)
    return logps.gather(1, targets[:, None]).squeeze(1)


def test_the_oracle_is_autograd_in_float64(inputs, monkeypatch):
    # Several slabs, the last one ragged.
    monkeypatch.setattr(gate, "SLAB", 128)
    oracle = gate.make_oracle(inputs)
    double = in_float64(inputs)
    value, dhidden, dweight = train(exact_head, double, inputs.grad_N)
    assert dhidden is not None
    assert dweight is not None
    torch.testing.assert_close(oracle.exact.logp_N, value)
    grad_R = inputs.grad_N.double()[oracle.rows_R, None]
    torch.testing.assert_close(grad_R * oracle.exact.dhidden_RD, dhidden[oracle.rows_R])
    dz_NC = inputs.grad_N.double()[:, None] * oracle.exact.slope_NC
    torch.testing.assert_close(dz_NC.T @ double.hidden_ND, dweight[oracle.columns_C])


def test_the_naive_model_errs_as_the_naive_computation_does():
    inputs = make_inputs(SHAPE, "bf16")
    oracle = gate.make_oracle(inputs)
    error = (oracle.naive.logp_N - oracle.exact.logp_N).abs().max()
    # A log-probability of about -10 has a rounding error of at most 2 ** -5 in bf16.
    assert 1e-3 < error < 0.1
    errors = check(train(peers.eager, inputs, inputs.grad_N), inputs)
    for found in (errors.dhidden, errors.dweight):
        assert found is not None
        assert 1e-4 < found < 1e-2


@pytest.mark.parametrize("way", [ONE_PASS, TWO_PASSES])
@pytest.mark.parametrize("pattern", ["score", "train", "mcpo"])
def test_right_results_pass_in_every_pattern(inputs, pattern, way):
    upstream = inputs.drawn_grad_N if pattern == "mcpo" else inputs.grad_N
    for name in ("eager", "mcpo_portable"):
        head = peers.build(peers.named(name))
        errors = check(make_job(head, inputs, pattern, way)(), inputs, upstream)
        assert errors.value <= errors.value_allowed
        assert (errors.dhidden is None) == (pattern == "score")
        if name == "mcpo_portable":
            assert errors.value < 1e-5


def off_by_one(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return peers.eager(hidden, weight, (targets + 1) % weight.shape[0])


def without_softmax(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return (hidden * weight[targets]).sum(1)


def not_a_number(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return peers.eager(hidden, weight, targets) * math.nan


def one_row_wrong(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    value = peers.eager(hidden, weight, targets)
    return value + 0.5 * torch.nn.functional.one_hot(torch.tensor(7), value.shape[0])


@pytest.mark.parametrize("head", [off_by_one, without_softmax, not_a_number, one_row_wrong])
def test_wrong_values_are_refused(inputs, head):
    message = r"it: value is off by \S+, \S+ is allowed; it is not timed"
    with pytest.raises(AssertionError, match=message):
        check(make_job(head, inputs, "score", ONE_PASS)(), inputs)


def test_values_in_bf16_are_refused_of_float32():
    inputs = make_inputs(SHAPE, "fp32")
    results = train(lambda *args: peers.eager(*args).bfloat16(), inputs, inputs.grad_N)
    with pytest.raises(AssertionError, match="value is off by"):
        check(results, inputs)


@pytest.mark.parametrize(("name", "named"), [("dhidden_ND", "hidden"), ("dweight_VD", "weight")])
def test_wrong_gradients_are_refused(inputs, name, named):
    right = train(peers.eager, inputs, inputs.grad_N)
    for wrong in (1.05, -1.0, math.nan):
        results = right._replace(**{name: getattr(right, name) * wrong})
        with pytest.raises(AssertionError, match=f"it: gradient of {named} is off by"):
            check(results, inputs)


def test_gradients_of_rows_that_were_not_drawn_are_refused(inputs):
    results = train(peers.eager, inputs, inputs.grad_N)
    with pytest.raises(AssertionError, match="gradient of hidden is off by"):
        check(results, inputs, inputs.drawn_grad_N)


def test_a_gradient_that_misses_some_rows_is_refused(inputs):
    lacking = inputs.grad_N.clone()
    lacking[-6:] = 0.0
    results = train(peers.eager, inputs, inputs.grad_N)._replace(
        dweight_VD=train(peers.eager, inputs, lacking).dweight_VD
    )
    with pytest.raises(AssertionError, match="gradient of weight is off by"):
        check(results, inputs)


def scalar_head(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return gate.dpo_loss(peers.eager(hidden, weight, targets))


def test_a_scalar_loss_passes_and_a_wrong_one_does_not(inputs):
    results = train(scalar_head, inputs, inputs.grad_N)
    assert results.value.ndim == 0
    errors = check(results, inputs)
    assert errors.dweight is not None
    with pytest.raises(AssertionError, match="value is off by"):
        check(results._replace(value=results.value * 1.1), inputs)
    wrong = train(lambda *args: -scalar_head(*args), inputs, inputs.grad_N)
    with pytest.raises(AssertionError, match="gradient of hidden is off by"):
        check(wrong._replace(value=results.value), inputs)


def test_slopes_of_the_scalar_loss_are_its_derivative():
    logp_N = torch.randn(16, dtype=torch.float64)
    step = torch.zeros(16, dtype=torch.float64)
    step[3] = 1e-4
    numeric = (gate.dpo_loss(logp_N + step) - gate.dpo_loss(logp_N - step)) / 2e-4
    assert gate.dpo_slopes(logp_N)[3].item() == pytest.approx(numeric.item(), rel=1e-6)
