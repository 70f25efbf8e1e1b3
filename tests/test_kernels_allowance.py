"""The logits cache and the gradient filter of the compiled head."""

from __future__ import annotations

import pytest
import torch
from conftest import FUSED

from mcpo_kernels import linear_logprob, sequence_logprobs
from mcpo_kernels.linear_logprob import cpu, ops
from mcpo_kernels.linear_logprob.head import PANEL
from mcpo_kernels.testing import Shape, assert_within_budget, evaluate, make_inputs

needs_extension = pytest.mark.skipif(not cpu.AVAILABLE, reason=cpu.REASON)

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Several slabs of the vocabulary with a last panel that is not full, several tiles of rows.
LARGE = Shape(301, 70, 2503)
# A panel of float32 logits of all its rows.
PANEL_MB = 301 * PANEL * 4 / 2**20
ODD = (Shape(0, 5, 7), Shape(1, 3, 1), Shape(1, 8, 97), Shape(17, 5, 64), Shape(33, 9, 65))


def same_bits(first, second):
    for one, other in zip(first, second, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("cache_mb", [0.5 * PANEL_MB, 5 * PANEL_MB, 17.5 * PANEL_MB, 1e4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@needs_extension
def test_the_cache_changes_no_bit(dtype, cache_mb, portable, monkeypatch):
    monkeypatch.setattr(cpu, "PORTABLE", portable)
    case = make_inputs(LARGE, dtype, bias=True, softcap=20.0, scale=1.5)
    same_bits(evaluate("cpu", case, cache_mb=cache_mb), evaluate("cpu", case))


@pytest.mark.parametrize("shape", ODD, ids=str)
@pytest.mark.parametrize("filter_mass", [0.0, 0.3])
@needs_extension
def test_odd_shapes_with_a_cache(shape, filter_mass):
    case = make_inputs(shape, torch.float32, bias=True)
    case.grad.fill_(1.0)
    cached = evaluate("cpu", case, cache_mb=1.0, filter_mass=filter_mass)
    same_bits(cached, evaluate("cpu", case, filter_mass=filter_mass))


@pytest.mark.parametrize("panels", [0, 1, 12, 40])
@needs_extension
def test_the_cache_keeps_to_its_budget_and_is_read(panels):
    case = make_inputs(LARGE, torch.float32)
    hidden = case.hidden.requires_grad_()
    scores = ops.linear_logprob(
        hidden, case.weight, case.targets, None, None, 1.0, panels * PANEL_MB, 0.0, "cpu"
    )
    logits = scores[2]
    assert logits.shape == (panels, 301, PANEL)
    whole = hidden.detach() @ case.weight.T
    wide = logits.transpose(0, 1).reshape(301, -1)[:, :2503]
    torch.testing.assert_close(wide, whole[:, : wide.shape[1]], rtol=1e-5, atol=1e-5)
    before = torch.autograd.grad(scores[0], hidden, case.grad, retain_graph=True)[0]
    logits.data.fill_(1.0)
    after = torch.autograd.grad(scores[0], hidden, case.grad)[0]
    assert torch.equal(before, after) == (panels == 0)


@needs_extension
def test_nothing_is_kept_where_no_gradient_is_needed(monkeypatch):
    kept = []
    forward = cpu.forward

    def spy(*arguments):
        scores = forward(*arguments)
        kept.append(scores.logits_PNC.numel() + scores.panel_lse_NQ.numel())
        return scores

    monkeypatch.setattr(cpu, "forward", spy)
    case = make_inputs(LARGE, torch.float32)
    weight = case.weight.requires_grad_()
    options = {"cache_mb": 1.0, "filter_mass": 0.1, "impl": "cpu"}
    for wanted in (False, True):
        with torch.set_grad_enabled(wanted):
            linear_logprob(case.hidden, weight, case.targets, **options)
    linear_logprob(case.hidden, weight.detach(), case.targets, **options)
    assert [number > 0 for number in kept] == [False, True, False]


@needs_extension
def test_gradcheck_with_a_cache():
    case = make_inputs(Shape(5, 4, 130), torch.float64, bias=True)
    leaves = [case.hidden, case.weight, case.bias]

    def score(hidden, weight, bias):
        return linear_logprob(
            hidden, weight, case.targets, bias=bias, softcap=3.0, cache_mb=1.0, impl="cpu"
        )

    assert torch.autograd.gradcheck(score, [leaf.requires_grad_() for leaf in leaves])


# The filter.


@pytest.mark.parametrize("softcap", [None, 8.0])
@pytest.mark.parametrize("filter_mass", [1e-6, 1e-3, 0.05, 0.9])
@needs_extension
def test_the_filter_keeps_to_its_bound(filter_mass, softcap):
    """The three bounds of docs/numerics.md, in float64, where rounding does not blur them."""
    case = make_inputs(LARGE, torch.float64, bias=True, softcap=softcap, scale=1.5)
    exact = evaluate("cpu", case)
    filtered = evaluate("cpu", case, filter_mass=filter_mass)
    assert torch.equal(filtered.logp, exact.logp)
    left_out = case.grad.abs() * filter_mass * -exact.logp.expm1() * 1.5
    rounding = 1e-12
    error = (filtered.dhidden - exact.dhidden).norm(dim=1)
    assert (error <= left_out * case.weight.norm(dim=1).max() + rounding).all()
    error = (filtered.dweight - exact.dweight).norm(dim=1).sum()
    assert error <= (left_out * case.hidden.norm(dim=1)).sum() + rounding
    assert (filtered.dbias - exact.dbias).abs().sum() <= left_out.sum() + rounding


@pytest.mark.parametrize("filter_mass", [0.05, 0.2, 0.7])
@needs_extension
def test_of_one_row_exactly_the_smallest_panels_are_left_out(filter_mass):
    """With one row and gradient 1, dbias is dz itself: compared with the rule, entry by entry."""
    case = make_inputs(LARGE, torch.float64, bias=True)
    case.grad.zero_()
    case.grad[6] = 1.0
    exact = evaluate("cpu", case).dbias
    filtered = evaluate("cpu", case, filter_mass=filter_mass).dbias
    num_panels, target = -(-2503 // PANEL), int(case.targets[6]) // PANEL
    padded = torch.nn.functional.pad(-exact, (0, num_panels * PANEL - 2503))
    # The target's own entry is 1 - p; no panel but its own is told by it.
    mass = padded.view(num_panels, PANEL).sum(1)
    mass[target] = torch.inf
    ascending = mass.sort().values
    spared = filter_mass * exact[case.targets[6]].item()
    keeps = mass >= ascending[int((ascending.cumsum(0) <= spared).sum())]
    expected = torch.where(keeps.repeat_interleave(PANEL)[:2503], exact, 0.0)
    assert 0 < keeps.sum() < num_panels
    torch.testing.assert_close(filtered, expected, rtol=1e-12, atol=0.0)


@needs_extension
def test_a_gradient_that_is_no_number_is_not_filtered_out():
    case = make_inputs(LARGE, torch.float32)
    case.grad[4] = torch.nan
    assert evaluate("cpu", case, filter_mass=0.5).dweight.isnan().all()


@needs_extension
def test_the_filter_leaves_out_what_it_may():
    """Panels far below the others: with nearly all mass in two, the rest is not multiplied."""
    case = make_inputs(LARGE, torch.float32, bias=True)
    case.targets.remainder_(2 * PANEL)
    case.bias[:] = -40.0
    case.bias[: 2 * PANEL] = 0.0
    filtered = evaluate("cpu", case, filter_mass=1e-4)
    assert filtered.dweight[2 * PANEL :].count_nonzero() == 0
    assert filtered.dbias[2 * PANEL :].count_nonzero() == 0
    exact = evaluate("cpu", case)
    assert exact.dweight[2 * PANEL :].count_nonzero() > 0
    torch.testing.assert_close(filtered.dhidden, exact.dhidden, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@needs_extension
def test_a_filter_of_next_to_nothing_is_within_the_budget_of_the_whole(
    dtype, portable, monkeypatch
):
    monkeypatch.setattr(cpu, "PORTABLE", portable)
    case = make_inputs(LARGE, dtype, bias=True, softcap=30.0)
    assert_within_budget("cpu", case, filter_mass=1e-20)


@pytest.mark.parametrize("cache_mb", [0.0, 7 * PANEL_MB, 1e4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@needs_extension
def test_threads_and_cache_change_no_bit_of_a_filtered_backward(dtype, cache_mb):
    case = make_inputs(LARGE, dtype, bias=True)
    before = torch.get_num_threads()
    results = [evaluate("cpu", case, filter_mass=0.01)]
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(evaluate("cpu", case, cache_mb=cache_mb, filter_mass=0.01))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        same_bits(results[0], other)


@needs_extension
def test_a_filtered_gradient_of_a_row_depends_on_nothing_but_the_row():
    case = make_inputs(LARGE, torch.bfloat16)

    def gradient(rows):
        hidden = case.hidden[rows].requires_grad_()
        logp = linear_logprob(hidden, case.weight, case.targets[rows], filter_mass=0.01, impl="cpu")
        return torch.autograd.grad(logp, hidden, case.grad[rows])[0]

    together = gradient(torch.arange(301))
    for rows in (torch.arange(1, 2), torch.arange(150, 290)):
        assert torch.equal(gradient(rows), together[rows])


@needs_extension
def test_what_is_no_number_is_not_filtered_out():
    case = make_inputs(LARGE, torch.float32)
    case.hidden[4] = torch.nan
    case.grad[4] = 1.0
    filtered = evaluate("cpu", case, filter_mass=0.5)
    assert filtered.dhidden[4].isnan().all()
    assert filtered.dweight.isnan().all()


@pytest.mark.parametrize("impl", FUSED)
def test_values_know_nothing_of_the_allowance(impl):
    case = make_inputs(LARGE, torch.bfloat16)
    seq_ids = torch.arange(301) // 50
    plain = sequence_logprobs(case.hidden, case.weight, case.targets, seq_ids, 7, impl=impl)
    hidden = case.hidden.requires_grad_()
    allowed = sequence_logprobs(
        hidden, case.weight, case.targets, seq_ids, 7, cache_mb=0.3, filter_mass=0.1, impl=impl
    )
    assert torch.equal(plain, allowed)


@pytest.mark.parametrize(
    "options", [{"cache_mb": -1.0}, {"cache_mb": torch.inf}, {"cache_mb": torch.nan}]
)
def test_a_cache_must_have_a_size(options):
    case = make_inputs(Shape(3, 4, 5), torch.float32)
    with pytest.raises(ValueError, match=r"cache_mb must be finite and >= 0, got .*4 bytes each"):
        linear_logprob(case.hidden, case.weight, case.targets, **options)


@pytest.mark.parametrize("filter_mass", [-0.1, 1.0, torch.nan])
def test_a_filter_leaves_out_a_share(filter_mass):
    case = make_inputs(Shape(3, 4, 5), torch.float32)
    with pytest.raises(ValueError, match=r"filter_mass must be in \[0, 1\), .*0 leaves nothing"):
        linear_logprob(case.hidden, case.weight, case.targets, filter_mass=filter_mass)


@needs_extension
def test_the_memory_of_a_cache_is_held_for_the_next_and_can_be_given_back():
    case = make_inputs(LARGE, torch.float32)
    torch.ops.mcpo_cpu.release_cache()
    assert torch.ops.mcpo_cpu.cache_held() == 0
    hidden = case.hidden.requires_grad_()

    def cached():
        return linear_logprob(hidden, case.weight, case.targets, cache_mb=1.0, impl="cpu")

    def place():
        scores = ops.linear_logprob(
            case.hidden, case.weight, case.targets, None, None, 1.0, 1.0, 0.0, "cpu"
        )
        return scores[2].data_ptr()

    first, second = cached(), cached()
    assert torch.ops.mcpo_cpu.cache_held() == 0
    gradients = [torch.autograd.grad(logp, hidden, case.grad)[0] for logp in (first, second)]
    assert torch.equal(*gradients)
    del first
    held = torch.ops.mcpo_cpu.cache_held()
    assert held >= 2**20 // (301 * PANEL * 4) * (301 * PANEL * 4)
    # Of two that are given back one is held.
    del second
    assert torch.ops.mcpo_cpu.cache_held() == held
    assert place() == place()
    assert torch.ops.mcpo_cpu.cache_held() == held
    torch.ops.mcpo_cpu.release_cache()
    assert torch.ops.mcpo_cpu.cache_held() == 0


@needs_extension
def test_the_memory_of_a_large_gradient_is_held_once_it_is_free():
    case = make_inputs(Shape(2, 260, 33000), torch.float32)
    weight = case.weight.requires_grad_()
    assert weight.nbytes > 32 * 2**20
    torch.ops.mcpo_cpu.release_cache()

    def gradient(grad):
        logp = linear_logprob(case.hidden, weight, case.targets, impl="cpu")
        return torch.autograd.grad(logp, weight, grad)[0]

    grad = torch.tensor([1.0, 2.0])
    first = gradient(grad)
    kept, place = first.clone(), first.data_ptr()
    # A gradient that lives is nobody else's memory.
    second = gradient(2 * grad)
    assert torch.ops.mcpo_cpu.cache_held() == 0
    assert torch.equal(first, kept)
    assert torch.equal(second, 2 * kept)
    del second, first
    assert torch.ops.mcpo_cpu.cache_held() >= weight.nbytes
    assert gradient(grad).data_ptr() == place
    # The last user's numbers do not shine through where nothing is written.
    assert not gradient(torch.zeros(2)).any()
    torch.ops.mcpo_cpu.release_cache()
    assert torch.ops.mcpo_cpu.cache_held() == 0


@needs_extension
@pytest.mark.parametrize("filter_mass", [0.0, 0.2])
def test_a_frozen_side_changes_no_bit_of_the_other(filter_mass):
    case = make_inputs(LARGE, torch.bfloat16)
    both = evaluate("cpu", case, filter_mass=filter_mass)
    for name, expected in (("hidden", both.dhidden), ("weight", both.dweight)):
        leaves = {"hidden": case.hidden.detach(), "weight": case.weight.detach()}
        leaf = leaves[name].requires_grad_()
        logp = linear_logprob(
            leaves["hidden"], leaves["weight"], case.targets, filter_mass=filter_mass, impl="cpu"
        )
        assert torch.equal(torch.autograd.grad(logp, leaf, case.grad)[0], expected)
        leaf.requires_grad_(False)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@needs_extension
def test_a_number_of_rows_that_is_a_symbol_is_traced():
    def loss(hidden, weight, targets):
        options = {"cache_mb": 0.2, "filter_mass": 0.1, "impl": "cpu"}
        return linear_logprob(hidden, weight, targets, **options).sum()

    torch.compiler.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=True)
    for num_tokens in (40, 301, 77):
        case = make_inputs(Shape(num_tokens, 70, 2503), torch.float32)
        hidden = case.hidden.requires_grad_()
        expected = torch.autograd.grad(loss(hidden, case.weight, case.targets), hidden)[0]
        traced = torch.autograd.grad(compiled(hidden, case.weight, case.targets), hidden)[0]
        assert torch.equal(traced, expected)


@pytest.mark.parametrize("impl", FUSED)
def test_gradients_of_transposed_arguments_have_the_layout_the_fake_says(impl):
    case = make_inputs(Shape(7, 5, 150), torch.float32)
    hidden = case.hidden.T.contiguous().T.requires_grad_()
    weight = case.weight.T.contiguous().T.requires_grad_()
    arguments = (hidden, weight, case.targets, None, None, 1.0, 1.0, 0.1, impl)
    torch.library.opcheck(torch.ops.mcpo.linear_logprob.default, arguments)
