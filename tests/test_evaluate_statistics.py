"""Clustered standard errors and exact sign-flip tests, against brute force and closed forms."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from mcpo.evaluate.statistics import clustered_mean, compare_paired, sign_flip_p_value


@pytest.mark.parametrize("seed", range(5))
def test_p_value_is_the_share_of_all_sign_patterns(seed):
    rng = random.Random(seed)
    differences = [rng.choice([-2, -1, 0, 0, 1, 1, 2]) for _ in range(9)]
    sums = [
        sum(sign * d for sign, d in zip(signs, differences, strict=True))
        for signs in itertools.product((-1, 1), repeat=len(differences))
    ]
    expected = sum(abs(total) >= abs(sum(differences)) for total in sums) / len(sums)
    assert sign_flip_p_value(differences) == expected


@pytest.mark.parametrize(("wins", "losses"), [(8, 2), (2, 8), (30, 10), (5, 0)])
def test_p_value_of_single_checks_is_mcnemars(wins, losses):
    discordant = wins + losses
    tail = sum(math.comb(discordant, k) for k in range(max(wins, losses), discordant + 1))
    expected = min(1.0, 2 * tail / 2**discordant)
    assert sign_flip_p_value([1] * wins + [-1] * losses + [0] * 40) == pytest.approx(expected)


def test_p_value_of_no_difference_is_one():
    assert sign_flip_p_value([0, 0, 0]) == 1
    assert sign_flip_p_value([1, -1]) == 1


def test_p_value_stays_exact_for_many_clusters():
    assert sign_flip_p_value([1] * 400) == 2 / 2**400


def test_error_of_single_checks_is_the_ordinary_one():
    values = [1, 0, 0, 1, 1, 0, 1, 1]
    estimate = clustered_mean(values, list(range(8)))
    assert estimate.mean == 5 / 8
    assert estimate.stderr == pytest.approx(math.sqrt(5 / 8 * 3 / 8 / 8))


def test_error_of_checks_that_agree_counts_clusters_only():
    single = clustered_mean([1, 0, 0, 1], list("abcd"))
    double = clustered_mean([1, 1, 0, 0, 0, 0, 1, 1], list("aabbccdd"))
    assert double.mean == single.mean
    assert double.stderr == pytest.approx(single.stderr)


def test_compare_paired():
    before = [True, False, False, False]
    after = [True, True, True, False]
    result = compare_paired(before, after, ["a", "a", "b", "c"])
    assert (result.before.mean, result.after.mean, result.difference.mean) == (0.25, 0.75, 0.5)
    assert (result.num_checks, result.num_clusters) == (4, 3)
    assert result.p_value == sign_flip_p_value([1, 1, 0])


def test_checks_of_a_cluster_flip_together():
    result = compare_paired([False] * 6, [True] * 6, ["a", "a", "a", "b", "b", "b"])
    assert result.p_value == 0.5


@pytest.mark.parametrize(
    ("before", "after", "clusters"),
    [([], [], []), ([True], [True, False], ["a"]), ([True], [True], [])],
)
def test_unequal_or_empty_input(before, after, clusters):
    with pytest.raises(ValueError, match=r"one entry per check, and at least one; got \d, \d"):
        compare_paired(before, after, clusters)
