"""One point from start to end: problem, arms, gate, memory, rounds, rows."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.measure import Clocks, Taken, timed
from benchmarks.rows import Provenance
from benchmarks.step import flops, gate, memory, models, problem
from benchmarks.step.arms import Arm, Built
from benchmarks.step.points import Point
from benchmarks.step.rows import Row


@dataclass(frozen=True, kw_only=True, slots=True)
class Ready:
    """An arm that passed the gate."""

    arm: Arm
    built: Built
    model: PreTrainedModel
    errors: gate.Errors
    taken: list[Taken] = field(default_factory=list[Taken])
    others: list[float] = field(default_factory=list[float])


@dataclass(frozen=True, kw_only=True, slots=True)
class Session:
    """The arms of a point in one process, whose weights are the same memory."""

    point: Point
    problem: problem.Problem
    costs: flops.Costs
    arms: tuple[Ready, ...]

    def round(self, number: int) -> None:
        """Time every arm once; rounds begin with another arm each."""
        first = number % len(self.arms)
        for ready in (*self.arms[first:], *self.arms[:first]):
            # Not the garbage of the arm before.
            gc.collect()
            before = Clocks.read()
            _, taken = timed(ready.built.step, self.point.device)
            ready.others.append(Clocks.read().others_since(before))
            ready.taken.append(taken)
            ready.model.zero_grad(set_to_none=True)

    def peaks(self) -> dict[str, int]:
        """Peak bytes of each arm."""
        if self.point.device == "cuda":
            return {
                ready.arm.name: memory.peak_on_gpu(ready.built.step, ready.model)
                for ready in self.arms
            }
        return {
            ready.arm.name: memory.peak_of(ready.arm.name, self.point.model, self.problem).num_bytes
            for ready in self.arms
        }

    def rows(self, peaks: dict[str, int], origin: Provenance) -> list[Row]:
        """What was measured, arm by arm."""
        return [
            Row(
                point=self.point,
                arm=ready.arm.name,
                recompute=ready.built.recompute,
                seconds=tuple(taken.seconds for taken in ready.taken),
                wall_seconds=tuple(taken.wall_seconds for taken in ready.taken),
                others=tuple(ready.others),
                peak_bytes=peaks.get(ready.arm.name),
                flops=flops.count(ready.arm, ready.built.recompute, self.problem, self.costs),
                tokens=flops.packed_tokens(ready.arm, self.problem),
                errors=dataclasses.asdict(ready.errors),
                versions=_versions(ready.arm),
                provenance=origin,
            )
            for ready in self.arms
        ]


def prepare(
    point: Point, chosen: Sequence[Arm], data: Path | None, say: Callable[[str], None]
) -> Session:
    """Build the arms and run each once, through the gate.

    Raises:
        AssertionError: an arm did not pass.
        Missing: an arm needs a package that is not installed.
    """
    model, tokenizer = models.load(point.model, point.device)
    posed = _pose(point, model, tokenizer, data)
    oracle = gate.make_oracle(posed, model)
    arms: list[Ready] = []
    for arm in chosen:
        twin = models.sharing(model)
        built = arm.build(posed.pairs() if arm.pairs else posed, twin, tokenizer)
        loss = built.step()
        errors = gate.check(loss, twin, oracle, arm.name)
        twin.zero_grad(set_to_none=True)
        say(
            f"{arm.name} ({built.recompute}): loss off by {errors.loss:.1e} of "
            f"{errors.loss_allowed:.1e} allowed, gradient by {errors.gradient:.1e} of "
            f"{errors.gradient_allowed:.1e}"
        )
        arms.append(Ready(arm=arm, built=built, model=twin, errors=errors))
    return Session(point=point, problem=posed, costs=flops.Costs.of(model), arms=tuple(arms))


def memory_rows(
    point: Point, chosen: Sequence[Arm], data: Path | None, origin: Provenance
) -> Iterator[Row]:
    """Peaks alone, arm by arm; they count beside times, and those have passed the gate."""
    model, tokenizer = models.load(point.model)
    posed = _pose(point, model, tokenizer, data)
    for arm in chosen:
        peak = memory.peak_of(arm.name, point.model, posed)
        yield Row(
            point=point,
            arm=arm.name,
            recompute=peak.recompute,
            seconds=(),
            wall_seconds=(),
            others=(),
            peak_bytes=peak.num_bytes,
            flops=flops.count(arm, peak.recompute, posed, flops.Costs.of(model)),
            tokens=flops.packed_tokens(arm, posed),
            errors={},
            versions=_versions(arm),
            provenance=origin,
        )


def _pose(
    point: Point, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: Path | None
) -> problem.Problem:
    if data is None:
        vocabulary = model.config.get_text_config().vocab_size
        groups = problem.synthetic_groups(point, vocabulary)
    else:
        groups = problem.groups_of(data, point, tokenizer)
    return problem.make(models.sharing(model), groups, point.dtype)


def _versions(arm: Arm) -> str:
    packages = ("transformers", "trl") if arm.is_trl else ("transformers",)
    return ", ".join(f"{name} {metadata.version(name)}" for name in packages)
