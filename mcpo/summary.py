"""The verdict of a run: a table on the screen, ``summary.json``, and a plot."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

from mcpo.checkpoint import TrainState
from mcpo.cli import to_flat
from mcpo.evaluate.generate import Completion
from mcpo.evaluate.statistics import PairedResult
from mcpo.evaluate.verifiable import VerifiableItem, compare, score
from mcpo.loop import Job
from mcpo.metrics import peak_memory_mb, read_metrics


def finish(
    job: Job,
    state: TrainState,
    items: Sequence[VerifiableItem],
    before: Sequence[Completion],
    after: Sequence[Completion],
    *,
    wall_s: float,
) -> None:
    """Write ``summary.json`` and ``curves.png`` into the output folder and print the table.

    Called by every rank, for the peak memory of the fullest; the first one writes.

    Args:
        job: the finished run.
        state: where it ended.
        items: held-out prompts, perhaps none.
        before: their completions by the model as it came.
        after: their completions by the trained model.
        wall_s: of everything: loading, reference, training and decoding.
    """
    peak_mb = max(job.engine.gather(peak_memory_mb(job.engine.device)))
    if not job.is_main:
        return
    metrics = read_metrics(job.output_dir / "metrics.jsonl")
    parts = compare(items, score(items, before), score(items, after)) if items else {}
    paired = parts.get("all")
    summary: dict[str, Any] = {
        **(_heldout(paired) if paired else {}),
        **(_lengths(before, after) if paired else {}),
        "heldout_parts": {part: _heldout(result) for part, result in parts.items()},
        "preference_accuracy": _last(metrics, "eval_rewards/accuracies"),
        "wall_s": wall_s,
        "train_wall_s": state.wall_s,
        "tokens_per_s": state.num_tokens / state.wall_s,
        "num_tokens": state.num_tokens,
        "steps": state.step,
        "peak_memory_mb": peak_mb,
        "world_size": job.engine.world_size,
        "environment": environment(job),
        "config": to_flat(job.config),
    }
    (job.output_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    plot(metrics, paired, job.output_dir / "curves.png")
    print_table(summary, job.console)
    job.console.print(f"details: {job.output_dir}/summary.json, curves.png, metrics.jsonl")


def environment(job: Job) -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "device": str(job.engine.device),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "autocast": str(job.engine.policy.autocast_dtype),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def print_table(summary: Mapping[str, Any], console: Console) -> None:
    """The few figures a person asks for first."""
    table = Table(title="MC-PO", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    if "heldout_n" in summary:
        for when in ("before", "after"):
            table.add_row(
                f"held-out checks passed, {when}",
                f"{summary[f'heldout_pass_{when}']:.1%} +- {summary[f'heldout_se_{when}']:.1%}",
            )
        table.add_row(
            "difference, paired",
            f"{summary['heldout_difference']:+.1%} +- {summary['heldout_se_difference']:.1%}",
        )
        table.add_row("p-value, paired", f"{summary['heldout_p_value']:.2g}")
        table.add_row("held-out checks", f"{summary['heldout_n']}")
        table.add_row(
            "tokens an answer, before and after",
            f"{summary['heldout_tokens_before']:.1f}, {summary['heldout_tokens_after']:.1f}",
        )
    if summary["preference_accuracy"] is not None:
        table.add_row("held-out preference accuracy", f"{summary['preference_accuracy']:.1%}")
    table.add_row(
        "wall time", f"{summary['wall_s']:.0f} s, training {summary['train_wall_s']:.0f} s"
    )
    table.add_row("throughput", f"{summary['tokens_per_s']:,.0f} tokens/s")
    table.add_row("peak memory", f"{summary['peak_memory_mb']:,.0f} MB")
    console.print(table)


def plot(metrics: Sequence[Mapping[str, Any]], paired: PairedResult | None, path: Path) -> None:
    """Loss, margin and held-out accuracy in one picture."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, (loss_axis, margin_axis, accuracy_axis) = plt.subplots(
        1, 3, figsize=(13, 3.8), layout="constrained"
    )
    for axis, name, title in (
        (loss_axis, "loss", "loss"),
        (margin_axis, "rewards/margins", "reward margin, chosen over drawn"),
    ):
        steps = [line["step"] for line in metrics if name in line]
        values = [line[name] for line in metrics if name in line]
        axis.plot(steps, values, color="C0", alpha=0.35, linewidth=1)
        axis.plot(steps, smooth(values), color="C0", linewidth=2)
        axis.set(title=title, xlabel="step")
    evaluated = [line for line in metrics if "eval_rewards/accuracies" in line]
    accuracy_axis.plot(
        [line["step"] for line in evaluated],
        [line["eval_rewards/accuracies"] for line in evaluated],
        "o-",
        label="preference accuracy",
    )
    if paired and metrics:
        accuracy_axis.errorbar(
            [0, metrics[-1]["step"]],
            [paired.before.mean, paired.after.mean],
            yerr=[paired.before.stderr, paired.after.stderr],
            fmt="s--",
            capsize=4,
            label="checks passed, greedy",
        )
    accuracy_axis.set(title="held out", xlabel="step", ylim=(0, 1))
    if accuracy_axis.has_data():
        accuracy_axis.legend(loc="lower right")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def smooth(values: Sequence[float], decay: float = 0.9) -> list[float]:
    """Exponential moving average, corrected for its start."""
    smoothed: list[float] = []
    total = weight = 0.0
    for value in values:
        total = decay * total + value
        weight = decay * weight + 1.0
        smoothed.append(total / weight)
    return smoothed


def _heldout(paired: PairedResult) -> dict[str, Any]:
    return {
        "heldout_pass_before": paired.before.mean,
        "heldout_pass_after": paired.after.mean,
        "heldout_se_before": paired.before.stderr,
        "heldout_se_after": paired.after.stderr,
        "heldout_difference": paired.difference.mean,
        "heldout_se_difference": paired.difference.stderr,
        "heldout_p_value": paired.p_value,
        "heldout_n": paired.num_checks,
    }


def _lengths(before: Sequence[Completion], after: Sequence[Completion]) -> dict[str, float]:
    """How long answers are and how many end by themselves: form can be met by brevity alone."""
    return {
        f"heldout_{what}_{when}": sum(value(one) for one in completions) / len(completions)
        for when, completions in (("before", before), ("after", after))
        for what, value in (
            ("tokens", lambda one: one.num_tokens),
            ("finished", lambda one: float(one.finished)),
        )
    }


def _last(metrics: Sequence[Mapping[str, Any]], name: str) -> float | None:
    values = [line[name] for line in metrics if name in line]
    return values[-1] if values else None
