from __future__ import annotations

import pytest

from mcpo_kernels import PrefixLayout


def test_a_tree():
    layout = PrefixLayout((3, 2, 0, 4, 1), (-1, 0, 0, 1, -1))
    assert layout.num_tokens == 10
    assert layout.starts == (0, 3, 5, 5, 9)
    assert [layout.ancestors(segment) for segment in range(5)] == [(), (0,), (0,), (0, 1), ()]
    assert [layout.prefix_length(segment) for segment in range(5)] == [0, 3, 3, 5, 0]


def test_some_segments_come_with_what_they_continue():
    layout = PrefixLayout((3, 2, 0, 4, 1), (-1, 0, 0, 1, -1))
    assert layout.with_ancestors([3]) == (0, 1, 3)
    assert layout.with_ancestors([4, 2, 2]) == (0, 2, 4)
    assert layout.restricted([3, 4]) == PrefixLayout((3, 2, 4, 1), (-1, 0, 1, -1))
    assert layout.restricted([]) == PrefixLayout((), ())


@pytest.mark.parametrize("segment", [-1, 5])
def test_a_segment_must_be_there(segment):
    layout = PrefixLayout((3, 2, 0, 4, 1), (-1, 0, 0, 1, -1))
    with pytest.raises(ValueError, match=rf"must be in \[0, 5\).*got {segment}"):
        layout.restricted([0, segment])


def test_varlen_has_no_parents():
    assert PrefixLayout.varlen((2, 0, 3)) == PrefixLayout((2, 0, 3), (-1, -1, -1))


def test_no_segments():
    layout = PrefixLayout((), ())
    assert layout.num_tokens == 0
    assert layout.starts == ()


@pytest.mark.parametrize(
    ("lengths", "parents", "message"),
    [
        ((1, 2), (-1,), "one entry per segment, got 2 lengths and 1 parents"),
        ((1, -2), (-1, 0), "lengths must be >= 0, got -2 for segment 1"),
        ((1, 2), (-1, 1), "-1 or an earlier segment, got 1 for segment 1"),
        ((1, 2), (-2, 0), "-1 or an earlier segment, got -2 for segment 0"),
    ],
)
def test_bad_layouts_are_explained(lengths, parents, message):
    with pytest.raises(ValueError, match=message):
        PrefixLayout(lengths, parents)
