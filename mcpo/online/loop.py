"""OnMC-PO: segment after segment, answers of the policy as it is, judged, then trained on.

A run of T steps is cut into segments (three in the paper, arXiv 2502.04567, section 5.3). Each
begins with new answers of the current policy and trains on them, with the optimizer, the schedule
and the reference carried on: every segment is a call of the ordinary ``run`` that goes on from the
last checkpoint with other rows.

What a segment makes stays in ``output_dir/segments/<number>``: ``samples-*.jsonl`` as they come,
then ``candidates.jsonl``, an ordinary file of rows. A run that is killed goes on at the prompt, the
verdict (of a judge with a cache) or the step where it was.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from mcpo import checkpoint
from mcpo.config import Config
from mcpo.data.mixture import SourceSpec
from mcpo.engine import local_rank, local_world_size, rank, world_size
from mcpo.engine.ranks import process_group, wait_for_all
from mcpo.loop import Segment, groups_per_step
from mcpo.online.answers import generator_of
from mcpo.online.config import OnlineRun
from mcpo.online.judging import judged
from mcpo.online.plan import Prompt, SamplingPlan
from mcpo.online.prompts import load_prompts
from mcpo.online.samples import count, read_work, sample_all
from mcpo.online.segments import cut_into_segments, prompts_of
from mcpo.placement import Placement, place
from mcpo.progress import progress
from mcpo.run import RESULTS, be_quiet, policy_folder, run

SEGMENTS = "segments"


def run_online(config: OnlineRun) -> None:
    """Train online as configured; every rank calls it.

    Raises:
        Everything that ``run`` raises, and of generation and judging: ``GenerationError`` and
        ``JudgeError``, which lose nothing that was answered.
    """
    be_quiet()
    placement = place(config.model, local_rank=local_rank(), local_world_size=local_world_size())
    prompts = load_prompts(Path(config.online.prompts))
    console = Console(quiet=rank() != 0, highlight=False)
    _check_folder(config)
    with process_group(placement.device):
        if rank() == 0 and config.run.overwrite_output_dir and not config.run.resume:
            shutil.rmtree(Path(config.run.output_dir), ignore_errors=True)
        wait_for_all()
        for segment in cut_into_segments(config.optim.max_steps, config.online.segments):
            if _is_done(config, segment):
                continue
            console.print(
                f"segment {segment.number + 1} of {config.online.segments}: steps "
                f"{segment.start} to {segment.stop}"
            )
            rows = make_rows(config, segment, prompts, placement, console)
            if not run(_with_rows(config, rows), segment):
                return


def make_rows(
    config: OnlineRun,
    segment: Segment,
    prompts: Sequence[Prompt],
    placement: Placement,
    console: Console,
) -> Path:
    """The segment's file of rows, from the policy as it is; made by all ranks, if it is not there.

    Raises:
        ValueError: an unfinished segment was begun with other settings, or no prompt gave a row.
    """
    folder = Path(config.run.output_dir) / SEGMENTS / str(segment.number)
    rows = folder / "candidates.jsonl"
    if rows.exists():
        return rows
    mine = prompts_of(
        prompts,
        segment,
        groups_per_step=groups_per_step(config.optim, world_size()),
        seed=config.run.seed,
        limit=config.online.prompts_per_segment,
    )
    plan = _plan_of(config, segment)
    _check_plan(folder, plan, mine)
    _sample(config, segment, mine, plan, folder, placement, console)
    wait_for_all()
    if rank() == 0:
        _judge(config, mine, folder, rows, console)
    wait_for_all()
    if not rows.exists():
        raise ValueError(f"the first rank wrote no {rows}; put output_dir on a shared file system")
    return rows


def _sample(
    config: OnlineRun,
    segment: Segment,
    prompts: Sequence[Prompt],
    plan: SamplingPlan,
    folder: Path,
    placement: Placement,
    console: Console,
) -> None:
    """This rank's share of the answers, on file."""
    known = _samples_in(folder)
    share = [each for each in prompts if each.row_id not in known][rank() :: world_size()]
    if not share:
        return
    policy = _policy_of(config, segment)
    with (
        ExitStack() as stack,
        progress(console, "answers", len(share), quiet=rank() != 0) as advance,
    ):
        generator = stack.enter_context(generator_of(config, policy, placement, folder))
        work = folder / f"samples-{rank()}-of-{world_size()}.jsonl"
        sample_all(share, plan, generator, work, lambda done: advance(done, ""))


def _judge(
    config: OnlineRun, prompts: Sequence[Prompt], folder: Path, rows: Path, console: Console
) -> None:
    """The rows of all prompts, in one file that appears whole."""
    known = _samples_in(folder)
    groups = [known[prompt.row_id] for prompt in prompts]
    answers = count(groups)
    result = judged(config.online, prompts, groups, folder.parent.parent, console)
    console.print(
        f"{answers.answers} answers to {len(prompts)} prompts: {answers.truncated} cut at "
        f"max_new_tokens, {answers.empty} empty, {answers.repeated} repeated; {len(result.rows)} "
        f"rows, {result.too_few} prompts with too few different answers, {result.undecided} where "
        "the judge told none from another",
        soft_wrap=True,
    )
    if not result.rows:
        raise ValueError(
            f"a segment needs a prompt whose answers the judge tells apart, got none of "
            f"{len(prompts)}; look at {folder}"
        )
    scratch = rows.with_suffix(".tmp")
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in result.rows)
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(rows)


def _samples_in(folder: Path) -> dict[str, Any]:
    """What all ranks have on file, of this start and of earlier ones."""
    found: dict[str, Any] = {}
    for path in sorted(folder.glob("samples-*.jsonl")):
        found |= read_work(path)
    return found


def _plan_of(config: OnlineRun, segment: Segment) -> SamplingPlan:
    online = config.online
    return SamplingPlan(
        temperatures=online.temperatures,
        samples_per_temperature=online.samples_per_temperature,
        max_new_tokens=online.max_new_tokens,
        stop=online.stop,
        seed=config.run.seed,
        round=segment.number,
    )


def _check_plan(folder: Path, plan: SamplingPlan, prompts: Sequence[Prompt]) -> None:
    """Note what decides the answers of a segment, or find it as it was noted."""
    now = json.loads(json.dumps(asdict(plan) | {"prompts": [each.row_id for each in prompts]}))
    noted = folder / "plan.json"
    if rank() == 0 and not noted.exists():
        folder.mkdir(parents=True, exist_ok=True)
        noted.write_text(json.dumps(now, indent=2) + "\n", encoding="utf-8")
    wait_for_all()
    then = json.loads(noted.read_text(encoding="utf-8"))
    differing = [name for name in now if now[name] != then.get(name)]
    if differing:
        raise ValueError(
            f"an unfinished segment goes on as it began, and {noted} differs in "
            f"{', '.join(differing)}; restore these, or start anew in another output_dir"
        )


def _policy_of(config: OnlineRun, segment: Segment) -> str:
    """The policy as the segment meets it: a folder, or the model's name before the first step."""
    if segment.start == 0:
        return config.model.model_name_or_path
    folder = policy_folder(Path(config.run.output_dir), segment.start)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"segment {segment.number + 1} samples from {folder}, which is not there; start anew "
            "in another output_dir"
        )
    return str(folder)


def _with_rows(config: OnlineRun, rows: Path) -> Config:
    """The ordinary run on the rows of a segment, from the last checkpoint on."""
    sections = {section.name: getattr(config, section.name) for section in fields(Config)}
    sections["data"] = replace(config.data, train_data=(SourceSpec(path=str(rows)),))
    sections["run"] = replace(config.run, resume=True, overwrite_output_dir=False)
    return Config(**sections)


def _is_done(config: OnlineRun, segment: Segment) -> bool:
    """Whether nothing of a segment is left to do."""
    output_dir = Path(config.run.output_dir)
    if segment.stop == config.optim.max_steps:
        return (output_dir / "summary.json").exists()
    newest = checkpoint.newest(output_dir)
    if newest is None or checkpoint.read_state(newest).step < segment.stop:
        return False
    following = output_dir / SEGMENTS / str(segment.number + 1) / "candidates.jsonl"
    return policy_folder(output_dir, segment.stop).is_dir() or following.exists()


def _check_folder(config: OnlineRun) -> None:
    """Refuse to go into another run's folder, or to lose one."""
    output_dir = Path(config.run.output_dir)
    names = (SEGMENTS, *RESULTS)
    found = next((output_dir / name for name in names if (output_dir / name).exists()), None)
    if found and not (config.run.resume or config.run.overwrite_output_dir):
        raise FileExistsError(
            f"output_dir must not hold another run, and {found} is there; give --resume to "
            "continue that run, --overwrite_output_dir to replace it, or another --output_dir"
        )
