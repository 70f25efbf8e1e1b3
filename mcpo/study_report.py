"""What came of a study: a table with errors and paired tests, and a plot."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mcpo.evaluate.generate import Completion
from mcpo.evaluate.statistics import Estimate, PairedResult, compare_paired
from mcpo.evaluate.verifiable import VerifiableItem, load_items, score

if TYPE_CHECKING:
    from mcpo.study import Run, Study

# Of a summary: what is shown, over which words.
SHOWN = {
    "heldout_pass_after": "checks passed, %",
    "preference_accuracy": "preference accuracy, %",
    "heldout_tokens_after": "tokens an answer",
    "num_tokens": "tokens trained on",
}
_PERCENT = ("heldout_pass_after", "preference_accuracy")


@dataclass(frozen=True, kw_only=True, slots=True)
class ArmResult:
    """An arm over its seeds."""

    means: Mapping[str, Estimate]
    """By the name in the summary; the error is that over seeds, NaN with one seed."""
    changes: Mapping[str, Estimate]
    """Of rates, less the baseline's, seed by seed: the error is that over seeds."""
    checks: PairedResult | None
    """Checks passed, baseline against arm: the same prompts and seeds, clustered by topic."""


def write_report(study: Study, runs: Sequence[Run]) -> str:
    """Write ``table.md``, ``study.json`` and ``study.png``; returns the table."""
    of_arm = {arm: [run for run in runs if run.arm == arm] for arm in study.arms}
    base = of_arm[study.baseline]
    results = {arm: _result(mine, base) for arm, mine in of_arm.items()}
    table = markdown(results, study.baseline, len(study.seeds))
    (study.output_dir / "table.md").write_text(table)
    (study.output_dir / "study.json").write_text(json.dumps(_plain(results), indent=2) + "\n")
    plot(results, study.baseline, study.output_dir / "study.png")
    return table


def over_seeds(values: Sequence[float]) -> Estimate:
    """Mean and its standard error over independent seeds."""
    mean = sum(values) / len(values)
    if len(values) == 1:
        return Estimate(mean=mean, stderr=math.nan)
    spread = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return Estimate(mean=mean, stderr=math.sqrt(spread / len(values)))


def _result(mine: Sequence[Run], base: Sequence[Run]) -> ArmResult:
    summaries, others = [_summary(run) for run in mine], [_summary(run) for run in base]
    means = {
        name: over_seeds([summary[name] for summary in summaries])
        for name in SHOWN
        if all(summary.get(name) is not None for summary in summaries)
    }
    pairs = list(zip(summaries, others, strict=True))
    changes = {
        name: over_seeds([ours[name] - theirs[name] for ours, theirs in pairs])
        for name in _PERCENT
        if name in means and mine != base
    }
    asked = mine[0].options.get("heldout_prompts")
    checks = _compare(load_items(Path(str(asked))), base, mine) if asked and mine != base else None
    return ArmResult(means=means, changes=changes, checks=checks)


def _compare(
    items: Sequence[VerifiableItem], base: Sequence[Run], mine: Sequence[Run]
) -> PairedResult:
    """All seeds together. A topic is a cluster over seeds too, whose answers are alike."""
    before: list[bool] = []
    after: list[bool] = []
    topics: list[str] = []
    for theirs, ours in zip(base, mine, strict=True):
        outcomes = zip(items, _outcomes(items, theirs), _outcomes(items, ours), strict=True)
        for item, was, now in outcomes:
            before += was
            after += now
            topics += [item.topic] * len(item.checks)
    return compare_paired(before, after, topics)


def _outcomes(items: Sequence[VerifiableItem], run: Run) -> list[tuple[bool, ...]]:
    lines = (run.folder / "heldout_after.jsonl").read_text().splitlines()
    answers = [{k: v for k, v in json.loads(line).items() if k != "id"} for line in lines]
    return score(items, [Completion(**answer) for answer in answers])


def _summary(run: Run) -> dict[str, Any]:
    return json.loads((run.folder / "summary.json").read_text())


def markdown(results: Mapping[str, ArmResult], baseline: str, seeds: int) -> str:
    """The table: a line an arm, the best pass rate first."""
    names = [name for name in SHOWN if all(name in result.means for result in results.values())]
    heads = ["arm", *(SHOWN[name] for name in names)]
    heads += [f"change in {SHOWN[name]}" for name in _PERCENT if name in names]
    heads += ["checks, change over topics", "p over topics"]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    key = names[0] if names else ""
    for arm, result in sorted(
        results.items(), key=lambda each: -each[1].means[key].mean if key else 0
    ):
        cells = [_shown(result.means[name], percent=name in _PERCENT) for name in names]
        for name in _PERCENT:
            if name in names:
                change = result.changes.get(name)
                cells.append(_shown(change, percent=True, sign="+") if change else "")
        checks = result.checks
        cells.append(_shown(checks.difference, percent=True, sign="+") if checks else "")
        cells.append(f"{checks.p_value:.2g}" if checks else "")
        lines.append(f"| {' | '.join([arm, *cells])} |")
    note = (
        f"\n{seeds} seeds. Changes are to {baseline}. Errors are over seeds, and changes are taken "
        "seed by seed. Over topics: the checks of all seeds together, on the same prompts; the "
        "error is clustered by topic, and p is the exact two-sided sign-flip test over topics, not "
        "corrected for the number of arms. It knows nothing of how seeds differ.\n"
    )
    return "\n".join(lines) + "\n" + note


def _shown(value: Estimate, *, percent: bool, sign: str = "") -> str:
    if not percent:
        return f"{value.mean:,.1f}"
    return f"{100 * value.mean:{sign}.1f} +- {100 * value.stderr:.1f}"


def plot(results: Mapping[str, ArmResult], baseline: str, path: Path) -> None:
    """Pass rate and preference accuracy of every arm, with errors over seeds."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    names = [name for name in _PERCENT if all(name in result.means for result in results.values())]
    arms = list(results)
    height = 1.2 + 0.3 * len(arms)
    figure, axes = plt.subplots(
        1, max(1, len(names)), figsize=(11, height), layout="constrained", squeeze=False
    )
    for axis, name in zip(axes[0], names, strict=False):
        means = [100 * results[arm].means[name].mean for arm in arms]
        errors = [100 * results[arm].means[name].stderr for arm in arms]
        errors = [0.0 if math.isnan(error) else error for error in errors]
        axis.errorbar(means, range(len(arms)), xerr=errors, fmt="o", capsize=3)
        axis.axvline(means[arms.index(baseline)], color="0.7", linewidth=1)
        axis.set(yticks=range(len(arms)), yticklabels=arms, xlabel=SHOWN[name])
        axis.invert_yaxis()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _plain(results: Mapping[str, ArmResult]) -> dict[str, Any]:
    """Ready for JSON, which has no NaN."""

    def number(value: float) -> float | None:
        return None if math.isnan(value) else value

    def estimate(value: Estimate | None) -> dict[str, float | None] | None:
        return value and {"mean": value.mean, "stderr": number(value.stderr)}

    return {
        arm: {
            "means": {name: estimate(value) for name, value in result.means.items()},
            "changes": {name: estimate(value) for name, value in result.changes.items()},
            "change_over_topics": estimate(result.checks.difference) if result.checks else None,
            "p_value": result.checks.p_value if result.checks else None,
        }
        for arm, result in results.items()
    }
