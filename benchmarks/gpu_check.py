"""One command that says whether the kernels work on this GPU, and how fast they are.

    make gpu-check

Four parts: what is here; `pytest -m gpu`; the benchmark of the head beside its peers, with rows in
benchmarks/results/head_cuda.jsonl; the verdict. Reports go to runs/gpu-check/. Under a quarter of
an hour. Ends with 1 if anything fails and with 2 where torch sees no GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from benchmarks import peers, provenance, report, rows, tables
from mcpo_kernels import Impl, available_impls, resolve

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "runs" / "gpu-check"
# Seconds; together a quarter of an hour.
TEST_LIMIT, BENCHMARK_LIMIT = 420, 450
BENCHMARK = (
    *("benchmarks/test_head.py", "--benchmark-only", "--device", "cuda", "--dtypes", "bf16"),
    *("--rounds", "10", "--budget", "2", "--benchmark-columns=median,min,max,rounds"),
)
TESTS = ("-m", "gpu", "tests", "-q")


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """What became of a part."""

    name: str
    passed: bool
    text: str
    seconds: float


def environment() -> str:
    """GPU, driver, versions, implementations and peers, a line each."""
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
        found = importlib.util.find_spec(module) is not None
        lines.append(f"module {module:16} {'found' if found else 'not installed'}")
    return "\n".join(lines)


def run_pytest(name: str, arguments: Sequence[str], limit: float) -> Part:
    """Run pytest, shown as it goes and kept in a file; a part that takes too long has failed."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    print(f"\n== {name}\n{' '.join(command)}", flush=True)
    began, last = time.perf_counter(), "nothing was printed"
    with (
        (FOLDER / f"{name}.log").open("w") as log,
        subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            log.write(line)
            last = line.strip() or last
            if time.perf_counter() - began > limit:
                process.terminate()
                last = f"stopped after {limit:.0f} s, at: {last}"
                break
        code = process.wait()
    return Part(name=name, passed=code == 0, text=last, seconds=time.perf_counter() - began)


def benchmark() -> Part:
    """Measure, and write tables and figures of this session's rows."""
    before = len(rows.read(rows.CUDA))
    part = run_pytest("benchmark", BENCHMARK, BENCHMARK_LIMIT)
    found = rows.read(rows.CUDA)[before:]
    if not found:
        return Part(name=part.name, passed=False, text=part.text, seconds=part.seconds)
    page = report.write(rows.CUDA, FOLDER)
    print(f"\n{tables.ours_against_the_best(rows.latest(found))}\n\nwrote {page}")
    # Time ran out with some cells measured: those are good, and the verdict says how many.
    return Part(
        name=part.name,
        passed=part.passed,
        text=f"{len(found)} rows; {part.text}",
        seconds=part.seconds,
    )


def verdict(parts: Sequence[Part]) -> str:
    """The last lines: a word for each part, and one for all."""
    lines = [
        f"{'PASS' if part.passed else 'FAIL'}  {part.name:12} {part.seconds:5.0f} s  {part.text}"
        for part in parts
    ]
    good = all(part.passed for part in parts)
    end = "the kernels work on this GPU" if good else f"something failed; logs are in {FOLDER}"
    return "\n".join([*lines, f"{'PASS' if good else 'FAIL'}: {end}"])


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
    FOLDER.mkdir(parents=True, exist_ok=True)
    began, found = time.perf_counter(), environment()
    print(f"== environment\n{found}", flush=True)
    (FOLDER / "environment.txt").write_text(found + "\n")
    choice = resolve("auto", torch.device("cuda"), torch.bfloat16)
    parts = [
        Part(
            name="environment",
            passed=choice.impl is Impl.TRITON,
            text=choice.reason,
            seconds=time.perf_counter() - began,
        )
    ]
    parts.append(run_pytest("tests", TESTS, TEST_LIMIT))
    if not options.skip_benchmark:
        parts.append(benchmark())
    text = verdict(parts)
    print(f"\n== verdict\n{text}")
    (FOLDER / "verdict.txt").write_text(text + "\n")
    return int(not all(part.passed for part in parts))


def _version(package: str) -> str:
    try:
        return f"{package} {metadata.version(package)}"
    except metadata.PackageNotFoundError:
        return f"{package} is not installed"


if __name__ == "__main__":
    sys.exit(main())
