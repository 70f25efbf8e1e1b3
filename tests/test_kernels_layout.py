from __future__ import annotations

import pytest

from mcpo_kernels import PrefixLayout


def test_a_tree():
    layout = PrefixLayout((3, 2, 0, 4, 1), (-1, 0, 0, 1, -1))
    assert layout.num_tokens == 10
    assert layout.starts == (0, 3, 5, 5, 9)
    assert [layout.ancestors(segment) for segment in range(5)] == [(), (0,), (0,), (0, 1), ()]
    assert [layout.prefix_length(segment) for segment in range(5)] == [0, 3, 3, 5, 0]


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
