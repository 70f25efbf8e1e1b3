from __future__ import annotations

import pytest
import torch
import vocab_parallel_ranks as ranks
from conftest import FUSED

from mcpo_kernels import linear_logprob, sequence_logprobs
from mcpo_kernels.testing import (
    Results,
    Shape,
    assert_results_within_budget,
    evaluate,
    make_inputs,
)

OPTIONS = {"bias": True, "softcap": 8.0, "scale": 0.7}
# V prime, several panels and, at the largest, several slabs of an implementation in one of a rank.
SHAPES = (Shape(17, 33, 101), Shape(2, 8, 50), Shape(0, 8, 50), Shape(150, 16, 4099))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    started = ranks.World(3, tmp_path_factory.mktemp("world"))
    yield started
    started.stop()


def even(num_vocab, num_ranks=3):
    """The cut of DTensor: the last rank has fewer rows, or none."""
    height = -(-num_vocab // num_ranks)
    return [min(rank * height, num_vocab) for rank in range(num_ranks + 1)]


def cuts(num_vocab):
    return {
        "even": even(num_vocab),
        "one row": [0, num_vocab - 1, num_vocab, num_vocab],
        "first empty": [0, 0, num_vocab // 3, num_vocab],
        "middle empty": [0, 1, 1, num_vocab],
    }


def succeed(results):
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


def gather(world, case, cut, impl, **options) -> Results:
    """Results of the group as those of a whole head; equal bits on all ranks are required."""
    results = succeed(world.run(ranks.evaluate_slab, case, cut, impl, **options))
    (first, _), *_ = results
    for result, scored in results:
        assert torch.equal(result.logp, first.logp)
        assert torch.equal(scored, first.logp)
        assert result.dhidden is first.dhidden or torch.equal(result.dhidden, first.dhidden)
    parts = [[result.dweight for result, _ in results], [result.dbias for result, _ in results]]
    dweight, dbias = (None if part[0] is None else torch.cat(part) for part in parts)
    return Results(first.logp, first.dhidden, dweight, dbias)


def assert_exact(actual, expected):
    """To 1e-12 of the largest number of each result: the few roundings of float64."""
    for name, ours, exact in zip(Results._fields, actual, expected, strict=True):
        if exact is None or not exact.numel():
            continue
        error, largest = (ours - exact).abs().max(), exact.abs().max()
        assert error <= 1e-12 * largest, f"{name}: {error:.1e} of {largest:.1e}"


@pytest.mark.parametrize("kind", ["even", "one row", "first empty", "middle empty"])
@pytest.mark.parametrize("shape", SHAPES, ids="N{0.num_tokens}-V{0.num_vocab}".format)
@pytest.mark.parametrize("impl", FUSED)
def test_a_sharded_head_is_the_whole_one(world, impl, shape, kind):
    for options in ({}, OPTIONS):
        case = make_inputs(shape, torch.float64, **options)
        actual = gather(world, case, cuts(shape.num_vocab)[kind], impl)
        assert_exact(actual, evaluate("reference", case))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("impl", FUSED)
def test_a_sharded_head_keeps_to_the_budget_of_a_whole_one(world, impl, dtype):
    for shape, options in ((SHAPES[0], OPTIONS), (SHAPES[1], {}), (SHAPES[3], {})):
        case = make_inputs(shape, dtype, **options)
        for kind in ("even", "middle empty"):
            actual = gather(world, case, cuts(shape.num_vocab)[kind], impl)
            assert_results_within_budget(actual, case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", FUSED)
def test_logits_of_ten_thousand(world, impl, dtype):
    case = make_inputs(SHAPES[0], dtype, peak=1e4)
    actual = gather(world, case, even(101), impl)
    assert all(torch.isfinite(each).all() for each in actual if each is not None)
    assert_results_within_budget(actual, case)


@pytest.mark.parametrize("impl", FUSED)
def test_large_numbers_are_subtracted_first(world, impl):
    """Logits that float32 holds exactly: were slabs merged by lse, the result would be off by 5e-4.

    Differences of logits are exact here. What is left is one relative rounding for each of the V
    terms and additions of the sum, and a few for exp and log.
    """
    num_vocab = 11
    case = make_inputs(Shape(4, 1, num_vocab), torch.float32)
    case.hidden.fill_(1.0)
    case.weight.copy_(10000.0 + torch.arange(num_vocab)[:, None] % 3)
    exact = evaluate("reference", case.to(torch.float64)).logp
    logp = gather(world, case, even(num_vocab), impl).logp
    units = (logp - exact).abs().max() / torch.finfo(torch.float32).eps
    assert units <= num_vocab + 8


@pytest.mark.parametrize("impl", FUSED)
def test_targets_of_one_slab(world, impl):
    case = make_inputs(SHAPES[0], torch.float64, bias=True)
    for column in (0, 33, 34, 100):
        case.targets.fill_(column)
        assert_exact(gather(world, case, even(101), impl), evaluate("reference", case))


@pytest.mark.parametrize("frozen", [("hidden",), ("weight", "bias"), ("weight",)], ids=str)
@pytest.mark.parametrize("impl", FUSED)
def test_what_is_frozen_changes_no_bit_of_the_rest(world, impl, frozen):
    case = make_inputs(SHAPES[0], torch.float32, bias=True)
    every = gather(world, case, even(101), impl)
    some = gather(world, case, even(101), impl, frozen=frozen)
    for name, ours, expected in zip(Results._fields, some, every, strict=True):
        if name.removeprefix("d") in frozen:
            assert ours is None
        else:
            assert torch.equal(ours, expected)


def test_frozen_hidden_states_cost_no_communication(world):
    case = make_inputs(SHAPES[0], torch.float64)
    first, *others = succeed(world.run(ranks.backward_alone, case, even(101)))
    expected = evaluate("reference", case).dweight[:34]
    torch.testing.assert_close(first, expected, rtol=1e-12, atol=1e-12)
    assert others == [None, None]


@pytest.mark.parametrize("impl", FUSED)
def test_poisoned_rows_without_gradient_do_not_spread_over_ranks(world, impl):
    case = make_inputs(SHAPES[0], torch.float32)
    expected = gather(world, case, even(101), impl)
    skipped = case.grad == 0
    case.hidden[skipped] = torch.nan
    actual = gather_gradients(world, case, impl)
    assert skipped.any()
    assert torch.equal(actual.dhidden, expected.dhidden)
    assert torch.equal(actual.dweight, expected.dweight)
    assert not actual.dhidden[skipped].any()


def gather_gradients(world, case, impl):
    """Without the comparison of values, which NaN would fail."""
    results = [
        result for result, _ in succeed(world.run(ranks.evaluate_slab, case, even(101), impl))
    ]
    return Results(
        results[0].logp,
        results[0].dhidden,
        torch.cat([result.dweight for result in results]),
        None,
    )


@pytest.mark.parametrize("impl", FUSED)
def test_a_cache_in_every_rank_changes_no_bit(world, impl):
    case = make_inputs(SHAPES[3], torch.float32)
    without = gather(world, case, even(4099), impl)
    cached = gather(world, case, even(4099), impl, cache_mb=0.5)
    for ours, expected in zip(cached, without, strict=True):
        assert ours is expected or torch.equal(ours, expected)


@pytest.mark.parametrize("impl", FUSED)
def test_the_filters_of_all_ranks_keep_to_the_bound_of_one(world, impl):
    """docs/numerics.md, with the mass that a row may leave out shared among the ranks.

    One row, whose gradient of the bias is that of its logits: the bound is sharp there.
    """
    mass = 0.2
    case = make_inputs(Shape(2, 16, 4099), torch.float64, bias=True)
    case.grad[0] = 0.0
    exact = evaluate("reference", case)
    actual = gather(world, case, even(4099), impl, filter_mass=mass)
    assert torch.equal(actual.logp, gather(world, case, even(4099), impl).logp)
    left_out = mass * -torch.expm1(exact.logp[1]) * case.grad[1].abs()
    error = (actual.dbias - exact.dbias).abs().sum()
    assert error <= left_out * (1 + 1e-12)
    assert (actual.dhidden - exact.dhidden)[1].norm() <= left_out * case.weight.norm(dim=1).max()
    # Only the compiled head leaves anything out; panels are small beside what it may.
    assert error > 0.8 * left_out if impl == "cpu" else error < 1e-9 * left_out


def test_sequence_sums_of_a_sharded_head(world):
    case = make_inputs(SHAPES[0], torch.float64)
    seq_ids = torch.arange(17) // 5
    for sums in succeed(world.run(ranks.sequence_sums, case, even(101), seq_ids)):
        whole = sequence_logprobs(
            case.hidden, case.weight, case.targets, seq_ids, 4, impl="reference"
        )
        torch.testing.assert_close(sums, whole, rtol=1e-12, atol=1e-12)


def test_two_of_three_ranks(world):
    case = make_inputs(SHAPES[0], torch.float64)
    whole = linear_logprob(case.hidden, case.weight, case.targets, impl="reference")
    *members, other = world.run(ranks.subgroup, case, [0, 60, 101])
    for logp in succeed(members):
        torch.testing.assert_close(logp, whole, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="this process must be in group, got a group of others"):
        raise other


@pytest.mark.parametrize("num_vocab", [101, 4], ids=["uneven", "last-empty"])
@pytest.mark.parametrize("impl", FUSED)
def test_dtensors_in_and_out(world, impl, num_vocab):
    case = make_inputs(Shape(17, 33, num_vocab), torch.float64, **OPTIONS)
    whole = evaluate("reference", case)
    results = succeed(world.run(ranks.evaluate_dtensors, case, "shard", impl))
    for result, _ in results:
        assert_exact(result, whole)
    cut = even(num_vocab)
    assert [local for _, local in results] == [cut[r + 1] - cut[r] for r in range(3)]
    for result, local in succeed(world.run(ranks.evaluate_dtensors, case, "replicate", impl)):
        assert_exact(result, whole)
        assert local == num_vocab


REFUSED_DTENSORS = {
    "no group": (TypeError, "weight must be a plain tensor, got a DTensor.*pass group= too"),
    "by columns": (ValueError, r"weight must be placed as Shard\(0\).*redistribute"),
    "partial": (ValueError, r"weight must be placed as Shard\(0\).*got P"),
    "bias whole": (ValueError, "weight and bias must be sharded alike.*distribute both"),
    "hidden": (TypeError, "hidden must be a plain tensor, got a DTensor.*to_local"),
    "mesh of two": (ValueError, r"mesh of one dimension, got 2; name the one.*mesh\['tp'\]"),
    "another order": (ValueError, r"in their order, got the mesh \[2, 1, 0\]"),
    "weight over two": (ValueError, "weight must be distributed over the ranks of group"),
}


@pytest.mark.parametrize(("error", "message"), REFUSED_DTENSORS.values(), ids=REFUSED_DTENSORS)
def test_what_dtensors_do_not_say_is_refused(world, request, error, message):
    case = make_inputs(SHAPES[0], torch.float64, bias=True)
    kind = request.node.callspec.id
    for result in world.run(ranks.refuse_dtensors, case, kind):
        with pytest.raises(error, match=message):
            raise result


def test_a_dtensor_over_other_ranks_than_the_group_is_refused(world):
    case = make_inputs(SHAPES[0], torch.float64, bias=True)
    first, *others = world.run(ranks.refuse_dtensors, case, "others")
    with pytest.raises(ValueError, match=r"over the ranks of group in their order.*ranks \[0\]"):
        raise first
    for result in others:
        with pytest.raises(ValueError, match="this process must be in group"):
            raise result


REFUSED = {
    "rows": (ValueError, r"hidden.shape\[0\] must be the same on every rank.*on rank 1 .*FSDP"),
    "targets": (ValueError, "^targets must be the same on every rank.*without group inside"),
    "dtype": (ValueError, "the dtype must be the same on every rank"),
    "scale": (ValueError, "softcap, scale or bias must be the same on every rank"),
    "out of range": (ValueError, r"targets must be in \[0, 101\), the rows of weight"),
    "whole": (ValueError, "rows of its own.*leave group out.*these are ranks 0 and 1"),
    "upstream": (ValueError, "number of rows with gradient must be the same.*the same loss"),
    "reference": (RuntimeError, r"impl='reference' cannot run here.*weight.full_tensor\(\)"),
}


@pytest.mark.parametrize(("error", "message"), REFUSED.values(), ids=REFUSED)
def test_ranks_that_do_not_agree_are_refused(world, request, error, message):
    case = make_inputs(SHAPES[0], torch.float64)
    kind = request.node.callspec.id
    for result in world.run(ranks.differ, case, even(101), kind):
        with pytest.raises(error, match=message):
            raise result


FSDP = {
    "without a group": (TypeError, "weight must be a plain tensor, got a DTensor sharded by FSDP2"),
    "with its group": (ValueError, "^targets must be the same on every rank.*as FSDP's do"),
}


@pytest.mark.parametrize(("error", "message"), FSDP.values(), ids=FSDP)
def test_a_weight_of_fsdp2_is_not_taken_for_a_sharded_head(world, request, error, message):
    case = make_inputs(SHAPES[0], torch.float64)
    given = request.node.callspec.id == "with its group"
    for result in world.run(ranks.train_on_other_rows, case, given):
        with pytest.raises(error, match=message):
            raise result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_parts_are_added_in_the_order_of_ranks_and_rounded_once(world, dtype):
    parts = [torch.randn(11, 7).to(dtype) for _ in range(3)]
    # Of 11 rows 4 have gradient: three ranks have two of them, two and none.
    grad = torch.zeros(11)
    grad[[0, 3, 4, 10]] = torch.tensor([1.0, -2.0, torch.nan, 3.0])
    first, second, third = (part.float() for part in parts)
    expected = torch.where(grad[:, None] != 0, (first + second) + third, 0.0).to(dtype)
    for total in succeed(world.run(ranks.sum_parts, parts, grad)):
        assert torch.equal(total, expected)


def test_second_derivative_is_refused_on_every_rank(world):
    case = make_inputs(SHAPES[0], torch.float64)
    for result in world.run(ranks.second_derivative, case, [0, 60, 101, 101]):
        with pytest.raises(RuntimeError, match="differentiated once"):
            raise result


@pytest.mark.parametrize("impl", FUSED)
def test_opcheck_of_the_sharded_ops(world, impl):
    succeed(
        world.run(
            ranks.check_ops, make_inputs(SHAPES[0], torch.float64, bias=True), even(101), impl
        )
    )


@pytest.mark.parametrize("kind", ["group", "mesh", "dtensor"])
def test_compile_traces_a_sharded_head_whole(world, kind):
    case = make_inputs(SHAPES[0], torch.float64, **OPTIONS)
    for eager, compiled in succeed(
        world.run(ranks.compile_it, case, [0, 60, 101, 101], "auto", kind)
    ):
        for ours, expected in zip(compiled, eager, strict=True):
            assert torch.equal(ours, expected)
