"""The training loop: take the rows of a step, step, log, evaluate, save."""

from __future__ import annotations

import signal
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from mcpo import checkpoint
from mcpo.checkpoint import TrainState
from mcpo.config import Config, OptimConfig
from mcpo.engine import Engine
from mcpo.evaluate.groups import evaluate_groups
from mcpo.lazy_chains import LazyChains
from mcpo.losses.baselines import RunningBaselines
from mcpo.metrics import MetricsFile, Track, peak_memory_mb
from mcpo.order import rank_share, step_rows, steps_per_epoch
from mcpo.pack import move, pack, split_by_budget
from mcpo.progress import progress
from mcpo.records import PackedBatch, TokenizedGroup
from mcpo.reference import Reference, ReferenceSync
from mcpo.step import StepWork, train_step


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything the loop works on."""

    config: Config
    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    schedule: torch.optim.lr_scheduler.LRScheduler
    train_groups: Sequence[TokenizedGroup]
    eval_batches: Sequence[PackedBatch]
    references: Reference
    reference_sync: ReferenceSync | None
    """What moves the reference, if it moves."""
    total_steps: int
    identity: Mapping[str, Any]
    console: Console
    baselines: RunningBaselines = field(default_factory=RunningBaselines)
    chains: LazyChains | None = None
    """With ``scoring: lazy``."""

    @property
    def output_dir(self) -> Path:
        """Where results go."""
        return Path(self.config.run.output_dir)

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and speaks."""
        return self.engine.rank == 0


def groups_per_step(config: OptimConfig, world_size: int) -> int:
    """Groups of one optimizer step over all ranks."""
    return config.per_device_train_batch_size * config.gradient_accumulation_steps * world_size


def count_steps(config: OptimConfig, num_groups: int, world_size: int) -> int:
    """Optimizer steps of a whole run."""
    if config.max_steps != -1:
        return config.max_steps
    per_epoch = steps_per_epoch(num_groups, groups_per_step(config, world_size))
    return max(1, round(config.num_train_epochs * per_epoch))


def work_of(job: Job, step: int) -> tuple[StepWork, float]:
    """This rank's share of step ``step`` (from 0), and the epoch reached after it."""
    optim = job.config.optim
    size = groups_per_step(optim, job.engine.world_size)
    num_groups = len(job.train_groups)
    _, rows = step_rows(num_groups, step, groups_per_step=size, seed=job.config.run.seed)
    mine = rank_share(rows, job.engine.rank, job.engine.world_size)
    whole = [job.train_groups[row] for row in mine or rows[:1]]
    packed = job.chains.reduced(whole, step) if job.chains else whole
    micro_batches = _micro_batches(job, packed)
    work = StepWork(
        step=step,
        batches=tuple(_on_device(job, micro_batch) for micro_batch in micro_batches),
        num_prompts=len(rows),
        weight=1.0 if mine else 0.0,
        rows=rows,
        chosen_tokens=sum(len(job.train_groups[row].candidate_ids[0]) for row in rows),
        baselines=job.baselines.values,
    )
    if job.chains:
        device, audit_steps = job.engine.device, job.config.kernel.lazy_audit_steps
        audited = _micro_batches(job, whole) if _due(audit_steps, step + 1) else []
        work = replace(
            work,
            visits=tuple(job.chains.at(some, step, device) for some in micro_batches),
            audits=tuple(
                (_on_device(job, some), job.chains.at(some, step, device)) for some in audited
            ),
        )
    return work, (step + 1) / steps_per_epoch(num_groups, size)


def _micro_batches(job: Job, groups: Sequence[TokenizedGroup]) -> list[list[TokenizedGroup]]:
    """A rank's groups of a step as they go through the model together."""
    optim, share = job.config.optim, job.config.model.shares_prefixes
    return [
        micro_batch
        for start in range(0, len(groups), optim.per_device_train_batch_size)
        for micro_batch in split_by_budget(
            groups[start : start + optim.per_device_train_batch_size],
            optim.max_tokens_per_micro_batch,
            share,
        )
    ]


def _on_device(job: Job, groups: Sequence[TokenizedGroup]) -> PackedBatch:
    return move(pack(groups, share_prefix=job.config.model.shares_prefixes), job.engine.device)


def train(job: Job, start: TrainState, track: Track) -> TrainState:
    """Run the steps that are left; where the run stands then is short of the end if interrupted."""
    state = start
    metrics_file = MetricsFile(job.output_dir, from_step=start.step) if job.is_main else None
    left = job.total_steps - start.step
    with (
        progress(job.console, "train", left, quiet=not job.is_main) as advance,
        _interrupts() as interrupted,
    ):
        for step in range(start.step, job.total_steps):
            began = time.monotonic()
            work, epoch = work_of(job, step)
            metrics = train_step(job.engine, work, job.references, job.config, job.chains)
            job.schedule.step()
            job.baselines.update(metrics, job.config.loss.baseline_decay)
            if job.reference_sync:
                job.reference_sync.after_step(step + 1)
            seconds = time.monotonic() - began
            state = TrainState(
                step=step + 1,
                wall_s=state.wall_s + seconds,
                num_tokens=state.num_tokens + metrics["num_tokens"],
                identity=dict(job.identity),
            )
            metrics |= evaluate_if_due(job, state.step)
            line = _line(job, state, metrics, epoch, seconds)
            if metrics_file and _is_logged(job, state.step, metrics):
                metrics_file.write(line)
                track(line, state.step)
            advance(1, note(metrics, line["tokens_per_second"]))
            # Ranks may hear of it at different steps; they stop at the same one.
            stop = bool(job.engine.sum(torch.tensor(len(interrupted), device=job.engine.device)))
            if stop or _due(job.config.run.save_steps, state.step):
                save(job, state)
            if stop:
                break
    if metrics_file:
        metrics_file.close()
    return state


def evaluate_if_due(job: Job, step: int) -> dict[str, float]:
    """Held-out metrics at the steps that ``eval_steps`` names and at the last one, else nothing."""
    due = step == job.total_steps or _due(job.config.run.eval_steps, step)
    if not due or not job.eval_batches:
        return {}
    return evaluate_groups(job.engine, job.eval_batches, job.references, job.config.loss)


def save(job: Job, state: TrainState) -> None:
    """Write a checkpoint, all ranks together."""
    checkpoint.save(
        job.engine,
        job.output_dir,
        state,
        tokenizer=job.tokenizer,
        training={
            "schedule": job.schedule.state_dict(),
            "baselines": job.baselines.state_dict(),
            "chains": job.chains.state_dict() if job.chains else None,
            "reference": job.reference_sync.state_dict() if job.reference_sync else None,
        },
        keep=job.config.run.save_total_limit,
    )


def note(metrics: Mapping[str, float], tokens_per_second: float) -> str:
    """What the progress bar says beside the time left."""
    return (
        f"loss {metrics['loss']:.3f}  margin {metrics['rewards/margins']:+.2f}  "
        f"{tokens_per_second:,.0f} tok/s"
    )


def _line(
    job: Job, state: TrainState, metrics: Mapping[str, float], epoch: float, seconds: float
) -> dict[str, float]:
    return {
        "step": state.step,
        "epoch": epoch,
        **metrics,
        "num_tokens": state.num_tokens,
        "tokens_per_second": metrics["num_tokens"] / seconds,
        "peak_memory_mb": peak_memory_mb(job.engine.device),
    }


def _is_logged(job: Job, step: int, metrics: Mapping[str, float]) -> bool:
    """At ``logging_steps``, at the end, and wherever an evaluation was paid for."""
    evaluated = any(name.startswith("eval_") for name in metrics)
    return evaluated or step == job.total_steps or _due(job.config.run.logging_steps, step)


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


@contextmanager
def _interrupts() -> Generator[list[int]]:
    """Collect Ctrl-C and SIGTERM, so that a step is finished and saved before the run stops.

    A second one stops at once.
    """
    received: list[int] = []

    def note_signal(number: int, frame: object) -> None:
        del frame
        if received:
            raise KeyboardInterrupt
        received.append(number)

    handlers = {
        number: signal.signal(number, note_signal) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
