"""A whole run, in the order of the flow: rows, tokens, policy, reference, training, verdict."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub.utils import disable_progress_bars
from rich.console import Console
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from mcpo import checkpoint, reference_cache
from mcpo.checkpoint import TrainState
from mcpo.cli import to_flat
from mcpo.config import Config
from mcpo.dry_run import describe
from mcpo.engine import Engine, launched_by_torchrun, local_rank
from mcpo.engine.ddp import DDPEngine, join_process_group
from mcpo.engine.single import SingleEngine
from mcpo.evaluate.heldout import decode
from mcpo.evaluate.verifiable import VerifiableItem, load_items
from mcpo.loop import Job, count_steps, train
from mcpo.losses import loss_named
from mcpo.metrics import tracker
from mcpo.models import load_model
from mcpo.optimizer import build_optimizer, build_schedule
from mcpo.pack import move, pack, split_by_budget
from mcpo.placement import Placement, place
from mcpo.policy import Policy, group_logps
from mcpo.prepare import Groups, load_groups, run_hash
from mcpo.progress import progress
from mcpo.records import PackedBatch, TokenizedGroup
from mcpo.reference_cache import ReferenceLogps
from mcpo.self_check import check_packing, check_reference
from mcpo.summary import finish
from mcpo_kernels import resolve

# The check of the reference looks at this many groups: enough to meet every kind of row, cheap
# beside a step.
NUM_CHECKED_GROUPS = 4


def run(config: Config) -> None:
    """Train as configured; prints what came of it and writes it under ``output_dir``.

    Raises:
        ValueError: the configuration, the data or a start-up check does not hold.
        FileNotFoundError: a file or model is not there.
        FileExistsError: the output folder holds checkpoints that would be overwritten.
        NonFiniteError: a loss or gradient is not finite.
    """
    loss_named(config.loss.loss_type)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    # Its bars for a single shard say nothing that ours do not.
    disable_progress_bars()
    placement = place(config.model, local_rank=local_rank())
    console = Console(quiet=os.environ.get("RANK", "0") != "0", highlight=False)
    console.print(placement.reason)
    items = load_items(Path(config.run.heldout_prompts)) if config.run.heldout_prompts else ()
    if config.run.dry_run:
        describe(config, console)
        return
    _refuse_overwriting(config)
    distributed = launched_by_torchrun()
    if distributed:
        join_process_group(placement.device)
    try:
        _run(config, placement, items, console, distributed=distributed)
    finally:
        if distributed:
            torch.distributed.destroy_process_group()


def _run(
    config: Config,
    placement: Placement,
    items: Sequence[VerifiableItem],
    console: Console,
    *,
    distributed: bool,
) -> None:
    began = time.monotonic()
    model, tokenizer = load_model(config.model.model_name_or_path, dtype=torch.float32)
    groups = load_groups(config.data, tokenizer, config.run.seed)
    console.print(groups.report)
    if config.model.gradient_checkpointing:
        model.activation_checkpointing_enable()
    policy = Policy(
        model, head_impl=config.model.head_impl, autocast_dtype=placement.autocast_dtype
    )
    policy.to(placement.device).train()
    optimizer = build_optimizer(policy, config.optim)
    engine: Engine = (
        DDPEngine(policy, optimizer, placement.device)
        if distributed
        else SingleEngine(policy, optimizer, placement.device)
    )
    references = _references(engine, groups, config, console)
    before = decode(engine, tokenizer, items, config.run, console, name="before") if items else []
    job = _job(config, engine, tokenizer, groups, references, console)
    state = train(job, _start(job), tracker(config.run, to_flat(config)))
    if state.step < job.total_steps:
        console.print(
            f"interrupted after step {state.step} of {job.total_steps}, saved in "
            f"{config.run.output_dir}; the same command with --resume continues"
        )
        return
    save_final(job)
    after = decode(engine, tokenizer, items, config.run, console, name="after") if items else []
    if job.is_main:
        finish(job, state, items, before, after, wall_s=time.monotonic() - began)
    engine.barrier()


def _references(engine: Engine, groups: Groups, config: Config, console: Console) -> ReferenceLogps:
    """Compute or read the reference log-probs of all groups, then check packing and them."""
    policy, share = engine.policy, config.model.prefix_sharing
    every = (*groups.train, *groups.held_out)
    batches = split_by_budget(every, config.optim.max_tokens_per_micro_batch, share)
    settings = {
        "autocast": str(policy.autocast_dtype),
        "model": {
            name: value
            for name, value in policy.model.config.to_diff_dict().items()
            if name not in ("_name_or_path", "transformers_version", "dtype")
        },
        "device": engine.device.type,
        "prefix_sharing": share,
        # The one that runs: "auto" may be another after an installation.
        "head_impl": resolve(config.model.head_impl, engine.device, torch.float32).impl.value,
        "reduction": "sum",
    }
    root = config.run.reference_cache_dir
    key = reference_cache.cache_key(policy.model.state_dict(), settings)
    folder = (Path(root) if root else reference_cache.default_cache_dir()) / key

    @torch.no_grad()
    def score(some: Sequence[TokenizedGroup]) -> list[list[float]]:
        batch = move(pack(some, share_prefix=share), engine.device)
        return reference_cache.unpack(group_logps(policy(batch), batch), batch)

    with progress(console, "reference", len(batches), quiet=engine.rank != 0) as advance:
        computed = reference_cache.complete(
            folder,
            batches,
            score,
            rank=engine.rank,
            world_size=engine.world_size,
            on_batch=lambda done: advance(1, ""),
        )
    engine.barrier()
    console.print(
        f"reference log-probs: {'computed' if computed else 'found'} in {folder}", soft_wrap=True
    )
    references = reference_cache.verified(folder, every)
    if config.run.self_check:
        _self_check(engine, groups, references, config, console)
    return references


def _self_check(
    engine: Engine,
    groups: Groups,
    references: ReferenceLogps,
    config: Config,
    console: Console,
) -> None:
    share = config.model.prefix_sharing
    rounding = check_packing(engine.policy, groups.train[0], share_prefix=share)
    checked = _packed(groups.train[:NUM_CHECKED_GROUPS], config, engine.device)
    gap = check_reference(
        engine.policy, checked, references, beta=config.loss.beta, rounding=rounding
    )
    console.print(
        f"self-check passed: packed equals plain to {rounding:.1e} nats per root of a token, "
        f"policy equals reference to {gap:.1e} nats",
        soft_wrap=True,
    )


def _job(
    config: Config,
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    groups: Groups,
    references: ReferenceLogps,
    console: Console,
) -> Job:
    total_steps = count_steps(config.optim, len(groups.train), engine.world_size)
    return Job(
        config=config,
        engine=engine,
        tokenizer=tokenizer,
        schedule=build_schedule(engine.optimizer, config.optim, total_steps),
        train_groups=groups.train,
        eval_batches=_packed(groups.held_out, config, engine.device),
        references=references,
        total_steps=total_steps,
        run_hash=run_hash(groups.train, config, engine.world_size),
        console=console,
    )


def _packed(
    groups: Sequence[TokenizedGroup], config: Config, device: torch.device
) -> list[PackedBatch]:
    share = config.model.prefix_sharing
    micro_batches = split_by_budget(groups, config.optim.max_tokens_per_micro_batch, share)
    return [move(pack(some, share_prefix=share), device) for some in micro_batches]


def _start(job: Job) -> TrainState:
    """Step 0, or with ``resume`` the newest checkpoint, loaded."""
    fresh = TrainState(step=0, wall_s=0.0, num_tokens=0.0, run_hash=job.run_hash)
    folder = checkpoint.newest(job.output_dir) if job.config.run.resume else None
    if folder is None:
        return fresh
    state = checkpoint.read_state(folder)
    if state.run_hash != job.run_hash:
        raise ValueError(
            f"a run resumes with the tokens, objective, schedule and world size it began with, and "
            f"those of {folder} differ; start anew in another output_dir"
        )
    checkpoint.load_weights(folder, job.engine.policy.model)
    training = checkpoint.load_training(folder)
    job.engine.optimizer.load_state_dict(training["optimizer"])
    job.schedule.load_state_dict(training["schedule"])
    job.console.print(f"resumed from {folder}")
    return state


def save_final(job: Job) -> None:
    """Write the trained model to ``output_dir/model`` from the first rank."""
    if job.is_main:
        folder = job.output_dir / "model"
        checkpoint.save_model(job.engine.policy.model, job.tokenizer, folder)
        job.console.print(f"model saved in {folder}")
    job.engine.barrier()


def _refuse_overwriting(config: Config) -> None:
    output_dir = Path(config.run.output_dir)
    found = checkpoint.newest(output_dir)
    if found is None or config.run.resume:
        return
    if not config.run.overwrite_output_dir:
        raise FileExistsError(
            f"output_dir must not hold another run's checkpoints, and {found} is there; give "
            "--resume to continue that run, --overwrite_output_dir to drop it, or another "
            "--output_dir"
        )
    while found := checkpoint.newest(output_dir):
        shutil.rmtree(found)
