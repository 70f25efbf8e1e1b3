"""An ablation: ``python -m mcpo.study recipes/studies/sampling.yaml``.

A study trains every arm with every seed. An arm is what differs from a common configuration; each
of its runs is an ordinary one of ``mcpo.train``, in ``<output_dir>/<arm>/seed<k>``, so one that is
done is left alone and one that was interrupted resumes. All arms are read, checked and planned
before the first one starts. ``table.md``, ``study.json`` and ``study.png`` come of it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mcpo.cli import make_config, read_yaml, to_flat
from mcpo.config import Config

# What a study says itself, for every run.
_OWN = ("seed", "output_dir", "resume", "overwrite_output_dir", "dry_run")
_KEYS = ("base", "output_dir", "seeds", "baseline", "options", "arms")


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """What is trained, and which arm the others are compared with."""

    output_dir: Path
    seeds: tuple[int, ...]
    baseline: str
    arms: Mapping[str, Mapping[str, Any]]
    """All options of each arm, under the names of a YAML file of ``mcpo.train``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One arm with one seed."""

    arm: str
    seed: int
    folder: Path
    options: Mapping[str, Any]

    @property
    def is_done(self) -> bool:
        """Whether its results are there; a run writes them last."""
        return (self.folder / "summary.json").exists()


def main(argv: Sequence[str] | None = None) -> int:
    """Run a study; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m mcpo.study", description=__doc__)
    parser.add_argument("file", help="YAML with " + ", ".join(_KEYS))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time")
    parser.add_argument("--check", action="store_true", help="check and plan the arms, then stop")
    arguments = parser.parse_args(argv)
    try:
        study = read_study(arguments.file)
        todo = check(study)
    except (ValueError, OSError, ModuleNotFoundError, NotImplementedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    count = len(study.arms) * len(study.seeds)
    print(f"{len(study.arms)} arms, {len(study.seeds)} seeds: {count - len(todo)} of {count} done")
    if arguments.check:
        return 0
    try:
        failed = train_all(todo, jobs=max(1, arguments.jobs))
    except KeyboardInterrupt:
        print("interrupted: the same command continues", file=sys.stderr)
        return 130
    if failed:
        print(f"stopped: {len(failed)} runs failed: {'; '.join(failed)}", file=sys.stderr)
        return 3
    # Only now, because it needs matplotlib.
    from mcpo.study_report import write_report

    print(write_report(study, runs_of(study)))
    return 0


def read_study(path: str) -> Study:
    """Read a file, and the configuration it builds on, relative to the working folder.

    Raises:
        ValueError: something is missing, unknown or of the wrong type; two arms are one.
        FileNotFoundError: a file is not there.
    """
    import yaml

    if not Path(path).is_file():
        raise FileNotFoundError(f"a study must be a YAML file, got {path!r}, which is not there")
    try:
        loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    given: dict[str, Any] = loaded if isinstance(loaded, dict) else {}
    if set(given) - set(_KEYS) or not isinstance(given.get("arms"), dict):
        found = sorted(given) or type(loaded).__name__
        raise ValueError(f"{path} must map arms, and any of {', '.join(_KEYS)}, got {found}")
    arms = _arms_of(given)
    baseline = str(given.get("baseline", next(iter(arms))))
    if baseline not in arms:
        raise ValueError(f"baseline must be one of the arms {list(arms)}, got {baseline!r}")
    seeds = tuple(given.get("seeds", (0,)))
    if not seeds or len(set(seeds)) < len(seeds) or not all(type(seed) is int for seed in seeds):
        raise ValueError(f"seeds must be different whole numbers, got {list(seeds)}")
    output_dir = Path(given.get("output_dir", Path("runs", "studies", Path(path).stem)))
    return Study(output_dir=output_dir, seeds=seeds, baseline=baseline, arms=arms)


def _arms_of(given: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """All options of every arm."""
    base = read_yaml(given["base"]) if "base" in given else {}
    options: dict[str, Any] = given.get("options") or {}
    arms: dict[str, dict[str, Any]] = {}
    for name, own in given["arms"].items():
        arm = options | (own or {})
        if not re.fullmatch(r"[\w.+-]+", str(name)):
            raise ValueError(f"an arm's name must do as a folder's, got {name!r}")
        taken = [option for option in _OWN if option in arm]
        if taken:
            raise ValueError(f"arm {name!r} must leave {', '.join(taken)} to the study")
        same = [other for other, known in arms.items() if known == base | arm]
        if same:
            raise ValueError(f"arms must differ, and {same[0]!r} and {name!r} are the same")
        arms[str(name)] = base | arm
    return arms


def runs_of(study: Study) -> list[Run]:
    """Every arm with every seed, seed by seed, so that all arms advance alike."""
    return [
        Run(
            arm=arm,
            seed=seed,
            folder=study.output_dir / arm / f"seed{seed}",
            options={
                **options,
                "seed": seed,
                "output_dir": str(study.output_dir / arm / f"seed{seed}"),
            },
        )
        for seed in study.seeds
        for arm, options in study.arms.items()
    ]


def check(study: Study) -> list[Run]:
    """Everything that can be known of the arms before they run; returns the runs that are left.

    Each arm is planned as ``--dry_run`` does: options, files, rows, tokens, model.

    Raises:
        ValueError: an arm is refused, or a folder holds a run of other options.
        FileNotFoundError, ModuleNotFoundError, NotImplementedError: as ``mcpo.run``, with the arm.
    """
    runs = runs_of(study)
    configs = {
        run.folder: _named(run.arm, lambda run=run: make_config(run.options)) for run in runs
    }
    for run in runs:
        if run.is_done:
            _check_done(run, configs[run.folder])
    todo = [run for run in runs if not run.is_done]
    for arm in dict.fromkeys(run.arm for run in todo):
        first = next(run for run in todo if run.arm == arm)
        config = configs[first.folder]
        dry = dataclasses.replace(config, run=dataclasses.replace(config.run, dry_run=True))
        _named(arm, lambda dry=dry: _plan(dry))
    return todo


def _plan(config: Config) -> None:
    from mcpo.run import run

    with contextlib.redirect_stdout(io.StringIO()):
        run(config)


def _named(arm: str, action: Any) -> Any:
    """Errors of an arm begin with its name."""
    try:
        return action()
    except (ValueError, OSError, ModuleNotFoundError, NotImplementedError) as error:
        raise type(error)(f"arm {arm!r}: {error}") from error


def _check_done(run: Run, config: Config) -> None:
    """A folder's results must be those of this very configuration."""
    stored = json.loads((run.folder / "summary.json").read_text())["config"]
    wanted = json.loads(json.dumps(to_flat(config)))
    differing = sorted(
        name for name in {*stored, *wanted} - set(_OWN) if stored.get(name) != wanted.get(name)
    )
    if differing:
        raise ValueError(
            f"{run.folder} must hold a run of arm {run.arm!r}, and differs in "
            f"{', '.join(differing)}; delete that folder, or give another output_dir"
        )


def train_all(runs: Sequence[Run], *, jobs: int) -> list[str]:
    """Train what is left, so many at a time; returns what failed, with the file that says why."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with ThreadPoolExecutor(jobs) as pool:
        try:
            outcomes = list(pool.map(lambda run: _train(run, threads), runs))
        except KeyboardInterrupt:
            # Runs under way were told too, and save what they have.
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return [outcome for outcome in outcomes if outcome is not None]


def _train(run: Run, threads: int) -> str | None:
    """One run in a process of its own."""
    import yaml

    run.folder.mkdir(parents=True, exist_ok=True)
    file, log = run.folder / "options.yaml", run.folder / "log.txt"
    # What an interrupted life left is resumed, or, short of a checkpoint, begun anew.
    file.write_text(yaml.safe_dump({**run.options, "resume": True, "overwrite_output_dir": True}))
    with log.open("w") as output:
        code = subprocess.run(
            [sys.executable, "-m", "mcpo.train", "--config", str(file)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            check=False,
        ).returncode
    done = run.is_done and code == 0
    print(f"{run.arm}, seed {run.seed}: {'done' if done else 'failed'}", flush=True)
    return None if done else f"{run.arm}, seed {run.seed} ({log})"


if __name__ == "__main__":
    sys.exit(main())
