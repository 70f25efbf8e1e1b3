"""Peak memory of a step, in a process of its own for each arm.

It is the peak beyond what the process held before the step, which is the weights: gradients count,
and the optimizer's state does not. The allocator keeps nothing (benchmarks/memory.py), and the step
before it, in the same process, has loaded whatever is loaded once.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from benchmarks.memory import ROOT, highest, keep_nothing
from benchmarks.step import models
from benchmarks.step.arms import Step, named
from benchmarks.step.problem import Problem, restore


class Peak(NamedTuple):
    """Of an arm, and what its backward computed again."""

    num_bytes: int
    recompute: str


def peak_of(arm: str, model: str, problem: Problem) -> Peak:
    """Start the process and wait for it.

    Raises:
        RuntimeError: it ended without an answer.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "problem.json"
        problem.save(path)
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.step.memory", arm, model, str(path)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
    if done.returncode != 0:
        raise RuntimeError(
            f"the process that measures the memory of {arm} ended with {done.returncode}; its "
            "output says why (-9: killed, as when memory is short)"
        )
    return Peak(*json.loads(done.stdout))


def peak_on_gpu(step: Step, model: PreTrainedModel) -> int:
    """In this process, whose step must be warm: torch's allocator counts what is allocated."""
    model.zero_grad(set_to_none=True)
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    model.zero_grad(set_to_none=True)
    return torch.cuda.max_memory_allocated() - before


def measure(arm: str, name: str, problem: Problem) -> Peak:
    """In this process, which must have done nothing else."""
    model, tokenizer = models.load(name)
    found = named(arm)
    built = found.build(problem.pairs() if found.pairs else problem, model, tokenizer)
    built.step()
    model.zero_grad(set_to_none=True)
    gc.collect()
    _, _, mib = highest(built.step)
    return Peak(round(mib * 2**20), built.recompute)


def main() -> None:
    """Answer on standard output."""
    keep_nothing()
    reply = os.fdopen(os.dup(1), "w")
    # Whatever a library prints must not look like an answer.
    os.dup2(2, 1)
    arm, name, path = sys.argv[1:]
    reply.write(json.dumps(measure(arm, name, restore(Path(path)))))
    reply.close()


if __name__ == "__main__":
    main()
