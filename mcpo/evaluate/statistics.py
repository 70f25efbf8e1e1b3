"""Statistics of a paired comparison: the same questions answered before and after training.

Checks of one topic are not independent, so standard errors are clustered (Miller 2024, "Adding
Error Bars to Evals"): the deviations of a cluster are summed before they are squared. The p-value
needs no normal approximation: if training made no difference, before and after could be swapped in
any cluster, so the sign of every cluster's difference is a fair coin. The p-value is the exact
share of all sign patterns whose sum is at least as far from zero as the one observed; with one
check per cluster this is the exact two-sided McNemar test.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A mean and its clustered standard error."""

    mean: float
    stderr: float


@dataclass(frozen=True, kw_only=True, slots=True)
class PairedResult:
    """Pass rates before and after, and whether their difference may be chance."""

    before: Estimate
    after: Estimate
    difference: Estimate
    """After minus before."""
    p_value: float
    """Exact and two-sided."""
    num_checks: int
    num_clusters: int


def compare_paired(
    before: Sequence[bool], after: Sequence[bool], clusters: Sequence[Hashable]
) -> PairedResult:
    """Compare two outcomes of the same checks.

    Args:
        before: whether each check was passed before.
        after: the same afterwards, in the same order.
        clusters: what each check belongs to; checks of equal clusters may depend on each other.
    """
    if not len(before) == len(after) == len(clusters) or not before:
        raise ValueError(
            "before, after and clusters must have one entry per check, and at least one; got "
            f"{len(before)}, {len(after)} and {len(clusters)}"
        )
    change = [int(late) - int(early) for early, late in zip(before, after, strict=True)]
    by_cluster: defaultdict[Hashable, int] = defaultdict(int)
    for cluster, value in zip(clusters, change, strict=True):
        by_cluster[cluster] += value
    return PairedResult(
        before=clustered_mean(before, clusters),
        after=clustered_mean(after, clusters),
        difference=clustered_mean(change, clusters),
        p_value=sign_flip_p_value(list(by_cluster.values())),
        num_checks=len(before),
        num_clusters=len(by_cluster),
    )


def clustered_mean(values: Sequence[float], clusters: Sequence[Hashable]) -> Estimate:
    """The mean of all values; its standard error counts the values of a cluster as dependent."""
    mean = sum(values) / len(values)
    deviation: defaultdict[Hashable, float] = defaultdict(float)
    for cluster, value in zip(clusters, values, strict=True):
        deviation[cluster] += value - mean
    stderr = math.sqrt(sum(total**2 for total in deviation.values())) / len(values)
    return Estimate(mean=mean, stderr=stderr)


def sign_flip_p_value(differences: Sequence[int]) -> float:
    """Share of sign patterns with a sum as far from zero as the sum of the differences."""
    # How many sign patterns give each sum: whole numbers, hence exact for any number of clusters.
    patterns = Counter({0: 1})
    for difference in differences:
        longer: Counter[int] = Counter()
        for total, count in patterns.items():
            longer[total + difference] += count
            longer[total - difference] += count
        patterns = longer
    observed = abs(sum(differences))
    extreme = sum(count for total, count in patterns.items() if abs(total) >= observed)
    return extreme / 2 ** len(differences)
