"""Where a row comes from: date, commit, command, machine."""

from __future__ import annotations

import datetime
import os
import re
import subprocess
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import torch

from benchmarks.rows import Provenance

ROOT = Path(__file__).parents[1]
# What the suite and the report write does not make a tree dirty.
WRITTEN = (
    ":!benchmarks/results",
    ":!docs/benchmarks.md",
    ":!docs/benchmarks_step.md",
    ":!docs/benchmarks",
    ":!docs/models.md",
)
FLAGS = ("fma", "avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16")


def collect(command: str, device: str = "cpu") -> Provenance:
    """Of rows measured from now on by this process."""
    on_gpu = device == "cuda"
    cpuinfo = Path("/proc/cpuinfo").read_text()
    flags = _field(cpuinfo, "flags").split()
    family, model = _field(cpuinfo, "cpu family"), _field(cpuinfo, "model")
    return Provenance(
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        commit=_git("rev-parse", "--short", "HEAD") or "unknown",
        dirty=bool(_git("status", "--porcelain", "--", ".", *WRITTEN)),
        command=command,
        cpu=f"{_field(cpuinfo, 'model name')} (family {family}, model {model})",
        flags=tuple(flag for flag in FLAGS if flag in flags),
        cores=os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        wait_policy=os.environ.get("OMP_WAIT_POLICY", "unset"),
        torch=torch.__version__,
        gpu=gpu_and_driver() if on_gpu else "",
        triton=metadata.version("triton") if on_gpu else "",
    )


def command(program: str, arguments: Iterable[object]) -> str:
    """A command line in which a path outside of the repository is its last part alone."""

    def shown(text: str) -> str:
        return Path(text).name if Path(text).is_absolute() else text

    return " ".join([program, *(shown(str(argument)) for argument in arguments)])


def gpu_and_driver() -> str:
    """Of the current device."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=False)
        driver = done.stdout.partition("\n")[0].strip() or "unknown"
    except FileNotFoundError:
        driver = "unknown"
    name, runtime = torch.cuda.get_device_name(), torch.version.cuda or torch.version.hip
    return f"{name}, driver {driver}, runtime {runtime}"


def _field(cpuinfo: str, name: str) -> str:
    found = re.search(rf"^{name}\s*: (.*)$", cpuinfo, re.MULTILINE)
    return found[1].strip() if found else "unknown"


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip()
