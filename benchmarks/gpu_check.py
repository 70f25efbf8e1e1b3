"""One command that says whether the kernels work on this GPU, and how fast they are.

    make gpu-check

Five parts: what is here; the tests of `pytest -m gpu`; the benchmark of the head beside its peers,
with rows in benchmarks/results/head_cuda.jsonl; the benchmark of a training step beside TRL's, with
rows in step_cuda.jsonl; the verdict. Reports go to runs/gpu-check/. Under a quarter of an hour. No
part keeps the next from running. Ends with 1 if anything fails and with 2 where torch sees no GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from benchmarks import peers, provenance, report, rows, tables
from benchmarks.step.arms import ARMS
from benchmarks.watched import Ended, watch
from mcpo_kernels import Impl, available_impls, resolve
from mcpo_kernels.linear_logprob.triton import entry

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "runs" / "gpu-check"
# Seconds; together less than a quarter of an hour.
TEST_LIMIT, HEAD_LIMIT, STEP_LIMIT = 420, 270, 150
# What a library warns of on a machine nobody has seen is no reason to stop.
PYTEST = ("-m", "pytest", "-p", "no:cacheprovider", "-W", "default")
TESTS = (*PYTEST, "-m", "gpu", "-q", "tests/test_gpu_head.py", "tests/test_gpu_device.py")
HEAD = (
    *(*PYTEST, "benchmarks/test_head.py", "--benchmark-only", "--device", "cuda"),
    *("--dtypes", "bf16", "--rounds", "10", "--budget", "2"),
    "--benchmark-columns=median,min,max,rounds",
)
STEP = (
    *("-m", "benchmarks.step", "--device", "cuda", "--dtype", "bf16", "--prompt", "256"),
    *("--completion", "128", "--pool", "5", "--groups", "4", "--rounds", "10", "--budget", "60"),
)
PASS, PART, FAIL = "PASS", "PART", "FAIL"


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """What became of a part."""

    name: str
    state: str
    """``PASS``, ``FAIL``, or ``PART``: some was measured, and then time ran out."""
    text: str
    seconds: float
    failures: tuple[str, ...] = ()


def environment() -> Part:
    """GPU, driver, versions, implementations and peers, a line each, and what ``auto`` takes."""
    began = time.perf_counter()
    free, total = torch.cuda.mem_get_info()
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    lines = [
        f"GPU            {provenance.gpu_and_driver()}",
        f"               capability {capability}, {torch.cuda.device_count()} of them, "
        f"{free / 2**30:.0f} of {total / 2**30:.0f} GiB free",
        f"torch          {torch.__version__}",
        f"triton         {_version('triton')}",
        *(f"impl {name.value:9} {state.reason}" for name, state in available_impls().items()),
    ]
    for peer in peers.PEERS:
        if not peer.ours and "cuda" in peer.devices:
            lines.append(f"peer {peer.name:18} {_version(peer.package or 'torch')}")
    for module in ("cutlass", "quack"):
        lines.append(f"module {module:16} {'found' if _installed(module) else 'not installed'}")
    found = "\n".join(lines)
    print(found, flush=True)
    (FOLDER / "environment.txt").write_text(found + "\n")
    choice = resolve("auto", torch.device("cuda"), torch.bfloat16)
    return Part(
        name="environment",
        state=PASS if choice.impl is Impl.TRITON else FAIL,
        text=choice.reason,
        seconds=time.perf_counter() - began,
    )


def tests() -> Part:
    """The kernels on the device."""
    return _part("tests", _run("tests", TESTS, TEST_LIMIT))


def head() -> Part:
    """Measure the head, and write tables and figures of this session's rows."""
    before = len(rows.read(rows.CUDA))
    ended = _run("head", HEAD, HEAD_LIMIT)
    found = rows.read(rows.CUDA)[before:]
    if found:
        page = report.write(rows.CUDA, FOLDER)
        print(f"\n{tables.ours_against_the_best(rows.latest(found))}\n\nwrote {page}")
    return _part("head", ended, f"{len(found)} rows", measured=bool(found))


def step() -> Part:
    """Measure a training step; its own gate refuses an arm that computes something else."""
    answer = FOLDER / "step.json"
    answer.unlink(missing_ok=True)
    with_trl = _installed("trl") and _installed("datasets")
    chosen = [arm.name for arm in ARMS if with_trl or not arm.is_trl]
    arguments = (*STEP, "--arms", ",".join(chosen), "--json", str(answer))
    # One device: trainers of others spread over all they see.
    device = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    ended = _run("step", arguments, STEP_LIMIT, CUDA_VISIBLE_DEVICES=device)
    if not answer.exists():
        return _part("step", ended)
    found = json.loads(answer.read_text())
    times = found["ratios"]["seconds"]
    compared = [f"{times[name]:.2f} of {name}" for name in ("trl_best", "dpo") if times.get(name)]
    kept = sum(bar["passed"] for bar in found["bars"])
    text = ", ".join([f"mcpo {found['seconds']['mcpo'] * 1e3:.1f} ms", *compared])
    return _part("step", ended, f"{text}; {kept} of {len(found['bars'])} bars kept")


def verdict(parts: Sequence[Part]) -> str:
    """The last lines: a word for each part, what failed in it, and a word for all."""
    lines: list[str] = []
    for part in parts:
        lines.append(f"{part.state}  {part.name:12} {part.seconds:5.0f} s  {part.text}")
        lines += [f"      {line}" for line in part.failures[:10]]
        if len(part.failures) > 10:
            lines.append(f"      and {len(part.failures) - 10} more")
    states = {part.state for part in parts}
    if FAIL in states:
        end = f"{FAIL}: something failed; logs are in {FOLDER}"
    elif PART in states:
        end = f"{PASS}: the kernels work on this GPU; there was no time to measure everything"
    else:
        end = f"{PASS}: the kernels work on this GPU"
    return "\n".join([*lines, end])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__)
    parser.add_argument("--skip_benchmark", action="store_true", help="tests alone")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(
            f"error: gpu-check needs a CUDA or ROCm device, and torch {torch.__version__} sees "
            "none; run it on a machine with a GPU and a build of torch for it",
            file=sys.stderr,
        )
        return 2
    if entry.INTERPRETED:
        print(
            "error: gpu-check runs kernels on the GPU, and TRITON_INTERPRET has them interpreted; "
            "unset it",
            file=sys.stderr,
        )
        return 2
    FOLDER.mkdir(parents=True, exist_ok=True)
    jobs = [environment, tests] if options.skip_benchmark else [environment, tests, head, step]
    parts = [guarded(job) for job in jobs]
    text = verdict(parts)
    print(f"\n== verdict\n{text}")
    (FOLDER / "verdict.txt").write_text(text + "\n")
    return int(any(part.state == FAIL for part in parts))


def guarded(job: Callable[[], Part]) -> Part:
    """A part, failed if it raises: the next ones run, and the verdict names what was raised."""
    began = time.perf_counter()
    print(f"\n== {job.__name__}", flush=True)
    try:
        return job()
    # Of any kind: what it is, the verdict says.
    except Exception as error:
        traceback.print_exc()
        text = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        seconds = time.perf_counter() - began
        return Part(name=job.__name__, state=FAIL, text=text, seconds=seconds)


def _run(name: str, arguments: Sequence[str], limit: float, **more: str) -> Ended:
    # Tuning would take the time of the tests.
    environ = {key: value for key, value in os.environ.items() if key != "MCPO_TUNE"}
    return watch([sys.executable, *arguments], limit, FOLDER / f"{name}.log", environ | more)


def _part(name: str, ended: Ended, found: str = "", *, measured: bool | None = None) -> Part:
    """A part of a command that ended.

    Args:
        name: of the part.
        ended: the command.
        found: what it brought, said first.
        measured: of a benchmark that may stop halfway, whether it brought anything.
    """
    state = PASS if ended.passed else FAIL
    if measured is not None:
        # A benchmark that measured nothing has failed, whatever its exit status.
        state = FAIL if not measured else PART if ended.stopped else state
    text = "; ".join(filter(None, (found, ended.last if state != PASS or not found else "")))
    return Part(name=name, state=state, text=text, seconds=ended.seconds, failures=ended.failures)


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _version(package: str) -> str:
    try:
        return f"{package} {metadata.version(package)}"
    except metadata.PackageNotFoundError:
        return f"{package} is not installed"


if __name__ == "__main__":
    sys.exit(main())
