import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mcpo.order import epoch_order, rank_share, step_rows, steps_per_epoch

counts = st.integers(1, 40)


@given(counts, counts, st.integers(0, 2**40), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_an_epoch_meets_every_row_once_and_steps_never_mix_epochs(rows, per_step, seed, epoch):
    steps = steps_per_epoch(rows, per_step)
    met = []
    for step in range(epoch * steps, (epoch + 1) * steps):
        got_epoch, indices = step_rows(rows, step, groups_per_step=per_step, seed=seed)
        assert got_epoch == epoch
        assert 1 <= len(indices) <= per_step
        met.extend(indices)
    assert sorted(met) == list(range(rows))
    assert met == epoch_order(rows, seed, epoch).tolist()


@given(st.lists(st.integers(), max_size=30), st.integers(1, 12))
def test_ranks_share_a_step_evenly(indices, world_size):
    shares = [rank_share(indices, rank, world_size) for rank in range(world_size)]
    assert [i for share in shares for i in share] == indices
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_order_differs_by_epoch_and_seed_and_is_repeatable():
    first = epoch_order(100, 0, 0).tolist()
    assert first != list(range(100))
    assert first != epoch_order(100, 0, 1).tolist()
    assert first != epoch_order(100, 1, 0).tolist()
    epoch_order.cache_clear()
    assert first == epoch_order(100, 0, 0).tolist()


def test_order_is_pinned_across_numpy_versions():
    assert epoch_order(8, 42, 1).tolist() == [7, 3, 4, 2, 5, 6, 0, 1]


def test_the_kept_order_cannot_be_changed_by_a_caller():
    with pytest.raises(ValueError, match="read-only"):
        epoch_order(4, 0, 0)[0] = 9


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: epoch_order(4, -1, 0), "seed and epoch must be >= 0, got 4, -1 and 0"),
        (lambda: steps_per_epoch(0, 4), "must be at least 1, got 0 and 4"),
        (lambda: step_rows(4, -1, groups_per_step=1, seed=0), "step must be >= 0, got -1"),
        (lambda: rank_share([1], 2, 2), "got rank 2 of 2"),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
