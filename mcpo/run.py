"""A whole run, in the order of the flow: rows, tokens, policy, reference, training, verdict.

What can be refused is refused before the first minute of work: options, data, model, output folder.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub.utils import disable_progress_bars
from rich.console import Console
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from mcpo import checkpoint
from mcpo.adapters import attach
from mcpo.checkpoint import TrainState
from mcpo.cli import to_flat
from mcpo.config import Config
from mcpo.dry_run import describe
from mcpo.encode import make_encoder
from mcpo.engine import Engine, local_rank, local_world_size, rank, world_size
from mcpo.engine.choose import LOADED_ONCE, check_combination, engine_name, make_engine
from mcpo.engine.ranks import process_group
from mcpo.evaluate.heldout import decode, decode_once
from mcpo.evaluate.verifiable import VerifiableItem, load_items
from mcpo.identity import differences, identity_of
from mcpo.lazy_chains import LazyChains
from mcpo.loop import Job, Segment, count_steps, save, train
from mcpo.metrics import Track, tracker
from mcpo.models import load_model
from mcpo.optimizer import build_schedule
from mcpo.placement import Placement, place
from mcpo.prefix_sharing import make_policy, settle
from mcpo.prepare import Groups, for_losses, load_groups
from mcpo.recompute import device_memory, resolve_recompute, state_bytes
from mcpo.reference import keeps_adapter, reference_weights, resolved_kind
from mcpo.reference_cache import weights_hash
from mcpo.reference_pass import make_reference, packed_batches
from mcpo.summary import finish
from mcpo_kernels import resolve
from mcpo_kernels.prefix_attention.choose import resolve_attention
from mcpo_kernels.prefix_attention.scores import ScoreRule

# What a run leaves in its folder, besides checkpoints: when it is done, and on the way.
RESULTS = ("model", "merged", "summary.json", "curves.png")
RECORDS = ("metrics.jsonl", "heldout_before.jsonl", "heldout_after.jsonl")


def run(config: Config, segment: Segment | None = None) -> bool:
    """Train as configured; prints what came of it and writes it under ``output_dir``.

    With a ``segment`` the run stops at its end, saved, and the next call goes on with other rows.

    Returns:
        Whether the run, or the segment, came to its end; False after an interrupt.

    Raises:
        ValueError: the configuration, the data or a start-up check does not hold.
        FileNotFoundError: a file or a model is not there.
        FileExistsError: the output folder holds a run that would be overwritten.
        ModuleNotFoundError: the package of a tracker is not installed.
        NotImplementedError: the model asks for attention that packing does not have.
        NonFiniteError: a loss or gradient is not finite.
    """
    be_quiet()
    resolved_kind(config)
    placement = place(config.model, local_rank=local_rank(), local_world_size=local_world_size())
    _check_impls(config, placement)
    check_combination(config, engine_name(config.scale))
    console = Console(quiet=rank() != 0, highlight=False)
    console.print(placement.reason, soft_wrap=True)
    items = load_items(Path(config.run.heldout_prompts)) if config.run.heldout_prompts else ()
    if config.run.dry_run:
        describe(config, placement.device, console)
        return True
    _check_output_dir(config)
    with process_group(placement.device):
        return _run(config, placement, items, console, segment)


def _run(
    config: Config,
    placement: Placement,
    items: Sequence[VerifiableItem],
    console: Console,
    segment: Segment | None,
) -> bool:
    began = time.monotonic()
    name = engine_name(config.scale)
    model, tokenizer = load_model(
        config.model.model_name_or_path,
        dtype=torch.float32,
        empty=name in LOADED_ONCE and rank() > 0,
    )
    if config.adapter.adapts:
        attach(model, config.adapter, seed=config.run.seed, keep_reference=keeps_adapter(config))
    groups = load_groups(config.data, tokenizer, config.run.seed, config.kernel)
    groups = for_losses(groups, config)
    console.print(groups.report, soft_wrap=True)
    policy, unpackable = make_policy(model, config, placement)
    # Counted now: what a sharded weight says of its size is an engine's own affair.
    state = state_bytes(config, model, name, world_size())
    engine = make_engine(name, policy, config, placement.device)
    config, rounding = settle(engine, groups.train, config, console, unpackable)
    memory = device_memory(placement.device, local_world_size())
    recompute = resolve_recompute(
        config,
        groups.train,
        model,
        memory,
        packs=policy.packs,
        state=state,
    )
    policy.set_recompute(recompute.mode)
    console.print(f"recompute {recompute.mode}: {recompute.reason}", soft_wrap=True)
    job, found, track = _prepare(
        config, engine, tokenizer, groups, console, rounding=rounding, segment=segment
    )
    encoder = make_encoder(tokenizer, prompt_format=config.data.prompt_format, chat_template=None)
    before = (
        decode_once(engine, encoder, items, config.run, console, name="before") if items else []
    )
    start = _load(job, found)
    state = train(job, start, track)
    if state.step < job.stop_step:
        console.print(
            f"interrupted after step {state.step} of {job.total_steps}, saved in "
            f"{config.run.output_dir}; the same command with --resume continues"
        )
        return False
    if state.step < job.total_steps:
        _save_segment(job, state)
        return True
    _save_final(job)
    after = decode(engine, encoder, items, config.run, console, name="after") if items else []
    # Training time of earlier lives of a resumed run counts; their loading and decoding does not.
    wall_s = time.monotonic() - began + start.wall_s
    finish(job, state, items, before, after, wall_s=wall_s)
    engine.barrier()
    return True


def _prepare(
    config: Config,
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    groups: Groups,
    console: Console,
    *,
    rounding: float,
    segment: Segment | None,
) -> tuple[Job, Path | None, Track]:
    """The job, the checkpoint to resume from, and the tracker; the reference pass comes last."""
    total_steps = count_steps(config.optim, len(groups.train), engine.world_size)
    segment = segment or Segment(number=0, start=0, stop=total_steps)
    schedule = build_schedule(engine.optimizer, config.optim, total_steps)
    # Hashed once, while the policy still is the reference.
    began_as = reference_weights(engine.policy, config) if config.adapter.adapts else None
    weights = weights_hash(began_as or engine.whole_state())
    identity = identity_of(engine, groups.train, config, weights)
    found = _checkpoint_to_resume(config, engine, identity, console, segment)
    if found is None:
        _clear_output_dir(config, engine)
    track = tracker(config.run, to_flat(config)) if engine.rank == 0 else _track_nothing
    reference, sync = make_reference(
        engine, groups, config, console, weights=weights, rounding=rounding
    )
    lazy = config.kernel.scoring == "lazy"
    job = Job(
        config=config,
        engine=engine,
        tokenizer=tokenizer,
        schedule=schedule,
        train_groups=groups.train,
        eval_batches=packed_batches(groups.held_out, config, engine.device),
        references=reference,
        reference_sync=sync,
        total_steps=total_steps,
        segment=segment,
        identity=identity,
        console=console,
        chains=LazyChains(groups.train, reference, config) if lazy else None,
    )
    return job, found, track


def _checkpoint_to_resume(
    config: Config,
    engine: Engine,
    identity: dict[str, object],
    console: Console,
    segment: Segment,
) -> Path | None:
    """With ``resume`` the newest checkpoint, of this very run; None to start from the beginning."""
    if not config.run.resume:
        return None
    folder = checkpoint.newest(Path(config.run.output_dir))
    seen = engine.gather(folder.name if folder else "none")
    if len(set(seen)) > 1:
        raise ValueError(
            f"every process must resume from the same checkpoint, and in {config.run.output_dir!r} "
            f"they see, by rank, {', '.join(seen)}; put output_dir on a file system they share"
        )
    if folder is None:
        console.print(
            f"no checkpoint in {config.run.output_dir}: starting from the beginning", soft_wrap=True
        )
        return None
    stored = checkpoint.read_state(folder)
    known = stored.identity
    if stored.step == segment.start:
        # It is the end of the segment before, which had rows of its own.
        known = known | {"training data": identity["training data"]}
    differing = differences(known, identity)
    if differing:
        raise ValueError(
            f"a run resumes as it began, and {folder} differs in: {'; '.join(differing)}; restore "
            "these, or start anew in another output_dir"
        )
    return folder


def _load(job: Job, folder: Path | None) -> TrainState:
    """Step 0, or where the checkpoint stands, with weights, optimizer and schedule loaded."""
    if folder is None:
        return TrainState(step=0, wall_s=0.0, num_tokens=0.0, identity=dict(job.identity))
    job.engine.load(folder)
    training = checkpoint.load_training(folder)
    job.schedule.load_state_dict(training["schedule"])
    job.baselines.load_state_dict(training["baselines"])
    state = checkpoint.read_state(folder)
    if job.chains and state.step > job.segment.start:
        job.chains.load_state_dict(training["chains"])
    if job.reference_sync:
        job.reference_sync.load_state_dict(training["reference"])
    # A sharded optimizer comes back without its options, which but for this one are the run's.
    for group, rate in zip(
        job.engine.optimizer.param_groups, job.schedule.get_last_lr(), strict=True
    ):
        group["lr"] = rate
    job.console.print(f"resumed from {folder}", soft_wrap=True)
    return state


def _save_final(job: Job) -> None:
    """Write the trained model to ``output_dir/model``, all ranks together."""
    folder = job.output_dir / "model"
    checkpoint.save_model(job.engine, job.tokenizer, folder)
    what = "adapter" if job.config.adapter.adapts else "model"
    job.console.print(f"{what} saved in {folder}", soft_wrap=True)
    if job.config.adapter.merge_adapter:
        merged = job.output_dir / "merged"
        checkpoint.save_merged(job.engine, job.tokenizer, merged)
        job.console.print(f"merged model saved in {merged}", soft_wrap=True)


def policy_folder(output_dir: Path, step: int) -> Path:
    """Where a segment leaves its policy for those who sample from it."""
    return output_dir / f"policy-{step}"


def _save_segment(job: Job, state: TrainState) -> None:
    """At the end of a segment that is not the last: a checkpoint, and the policy by itself."""
    if checkpoint.newest(job.output_dir) != checkpoint.folder_of(job.output_dir, state.step):
        save(job, state)
    folder = policy_folder(job.output_dir, state.step)
    write = checkpoint.save_merged if job.config.adapter.adapts else checkpoint.save_model
    write(job.engine, job.tokenizer, folder)


def _check_output_dir(config: Config) -> None:
    """Refuse to write over a file, or over another run that nobody said to drop."""
    output_dir = Path(config.run.output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise FileExistsError(f"output_dir must be a folder, and {output_dir} is a file")
    if config.run.overwrite_output_dir:
        return
    newest = checkpoint.newest(output_dir)
    if config.run.resume:
        # Records without a checkpoint are of a run that died early, and are in nobody's way.
        found = None if newest else _first_there(output_dir, RESULTS)
        if found:
            raise FileExistsError(
                "--resume continues from a checkpoint, or starts where there is nothing to lose; "
                f"{output_dir} has no checkpoint and the {found.name} of a finished run; give "
                "--overwrite_output_dir to replace it, or another --output_dir"
            )
        return
    found = newest or _first_there(output_dir, (*RESULTS, *RECORDS))
    if found:
        way_on = "--resume to continue that run, " if newest else ""
        raise FileExistsError(
            f"output_dir must not hold another run, and {found} is there; give {way_on}"
            "--overwrite_output_dir to replace it, or another --output_dir"
        )


def _first_there(folder: Path, names: Sequence[str]) -> Path | None:
    return next((folder / name for name in names if (folder / name).exists()), None)


def _clear_output_dir(config: Config, engine: Engine) -> None:
    """Drop what an earlier run left: by the first rank alone, once nothing stands in the way."""
    output_dir = Path(config.run.output_dir)
    if engine.rank == 0:
        while found := checkpoint.newest(output_dir):
            shutil.rmtree(found)
        for name in RESULTS[:2]:
            shutil.rmtree(output_dir / name, ignore_errors=True)
        for name in (*RESULTS[2:], *RECORDS):
            (output_dir / name).unlink(missing_ok=True)
    engine.barrier()


def _check_impls(config: Config, placement: Placement) -> None:
    dtype = placement.autocast_dtype or torch.float32
    try:
        resolve(config.model.head_impl, placement.device, dtype)
    except RuntimeError as error:
        raise ValueError(f"head_impl: {error}") from error
    # What a model asks of its attention besides is known at its first forward.
    bare = ScoreRule(scale=1.0, window=None, softcap=None, sinks_H=None)
    try:
        resolve_attention(config.model.attention_impl, placement.device, dtype, bare)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"attention_impl: {error}") from error


def _track_nothing(metrics: object, step: int) -> None:
    """The tracker of every rank but the first."""


def be_quiet() -> None:
    """Keep the libraries' own bars and warnings out of a run's output."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    disable_progress_bars()
