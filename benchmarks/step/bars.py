"""What a step is asked to be, beside what it is: nothing here is tuned to what came out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.step.arms import TRL_BEST, trl_names
from benchmarks.step.rows import Row


@dataclass(frozen=True, kw_only=True, slots=True)
class Bar:
    """A limit and the measured value."""

    name: str
    measured: float
    limit: float
    at_most: bool = True

    @property
    def passed(self) -> bool:
        """Whether the limit is kept."""
        return self.measured <= self.limit if self.at_most else self.measured >= self.limit


def with_best(arms: Mapping[str, Row]) -> dict[str, Row]:
    """The arms of a point, and the fastest of TRL's once more, as ``trl_best``."""
    candidates = [arms[name] for name in trl_names() if name in arms]
    if not candidates:
        return dict(arms)
    return {**arms, TRL_BEST: min(candidates, key=lambda row: row.median)}


def flop_ratio(arms: Mapping[str, Row]) -> float | None:
    """Of ``mcpo`` to ``dpo``."""
    if not {"mcpo", "dpo"} <= arms.keys():
        return None
    return arms["mcpo"].flops / arms["dpo"].flops


def time_ratio(arms: Mapping[str, Row], one: str, other: str) -> float | None:
    """Of medians; None where an arm was not measured."""
    return arms[one].median / arms[other].median if {one, other} <= arms.keys() else None


def memory_ratio(arms: Mapping[str, Row], one: str, other: str) -> float | None:
    """Of peaks; None where one was not measured."""
    if not {one, other} <= arms.keys():
        return None
    ours, theirs = arms[one].peak_bytes, arms[other].peak_bytes
    return None if ours is None or theirs is None else ours / theirs


def bars(arms: Mapping[str, Row]) -> list[Bar]:
    """Those whose arms were measured."""
    arms = with_best(arms)
    counted = flop_ratio(arms)
    time = time_ratio(arms, "mcpo", "dpo")
    asked = [
        ("time, mcpo / trl_default", time_ratio(arms, "mcpo", "trl_default"), 0.60, True),
        ("time, mcpo / trl_best", time_ratio(arms, "mcpo", TRL_BEST), 0.70, True),
        ("peak, mcpo / trl_default", memory_ratio(arms, "mcpo", "trl_default"), 1.0, True),
        ("peak, mcpo / trl_best", memory_ratio(arms, "mcpo", TRL_BEST), 1.0, True),
        (
            "peak, mcpo_selective / trl_default",
            memory_ratio(arms, "mcpo_selective", "trl_default"),
            1.0,
            True,
        ),
        *(
            (f"time, {one} / {other}", time_ratio(arms, one, other), 0.88, True)
            for one, other in _padded_pairs(arms)
        ),
        (
            "time, mcpo / dpo, over the ratio of FLOPs",
            time / counted if time is not None and counted is not None else None,
            1.10,
            True,
        ),
        ("time, mcpo_lazy / dpo_padded", time_ratio(arms, "mcpo_lazy", "dpo_padded"), 1.00, True),
        ("time, mcpo_naive / mcpo", time_ratio(arms, "mcpo_naive", "mcpo"), 1.8, False),
    ]
    return [
        Bar(name=name, measured=measured, limit=limit, at_most=at_most)
        for name, measured, limit, at_most in asked
        if measured is not None
    ]


def _padded_pairs(arms: Mapping[str, Row]) -> list[tuple[str, str]]:
    """MC-PO and the padded step that keeps as much for the backward."""
    found = [("mcpo_selective", "dpo_padded_checkpointed")]
    if "mcpo" in arms:
        kept = arms["mcpo"].recompute in ("none", "light")
        found.insert(0, ("mcpo", "dpo_padded" if kept else "dpo_padded_checkpointed"))
    return found
