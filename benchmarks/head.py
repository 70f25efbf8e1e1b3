"""Time and memory of the fused head on the CPU against bare matrix products of the same shapes.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/head.py --dtype bf16 --shape 1024,576,49152

Seconds are CPU seconds of this process divided by its threads, so that other jobs on the machine
disturb little; every candidate runs once per round, in turn, and medians over the rounds are
printed. The products write into memory that is there already; the head allocates its results.
"""
# N scored tokens, D hidden, V vocabulary

from __future__ import annotations

import argparse
import ctypes
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from mcpo_kernels import available_impls, linear_logprob

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
COLUMNS = (
    "shape N,D,V",
    "dtype",
    "GEMM s",
    "score",
    "train, all rows",
    "train, a third",
    "backward of a third",
    "frozen head",
    "memory MiB",
)


def eager(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """What one writes without a fused head."""
    logits = torch.nn.functional.linear(hidden, weight)
    return logits.float().log_softmax(1).gather(1, targets[:, None]).squeeze(1)


def cpu_seconds(run: Callable[[], object]) -> float:
    """CPU seconds of one call, by thread."""
    began = time.process_time()
    run()
    return (time.process_time() - began) / torch.get_num_threads()


def memory(field: str) -> float:
    """A line of this process' status in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def peak_beyond(run: Callable[[], list[Tensor]]) -> float:
    """MiB that a call needs at its peak beyond what it returns."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    results = run()
    return memory("VmHWM") - before - sum(result.nbytes for result in results) / 2**20


def measure(impl: str, dtype: str, shape: tuple[int, int, int], rounds: int) -> list[str]:
    """One row of the table."""
    num_tokens, num_hidden, num_vocab = shape
    torch.manual_seed(0)
    hidden = torch.randn(num_tokens, num_hidden).to(DTYPES[dtype])
    weight = (torch.randn(num_vocab, num_hidden) * 3 / num_hidden**0.5).to(DTYPES[dtype])
    targets = torch.randint(num_vocab, (num_tokens,))
    grad = torch.linspace(0.5, 1.0, num_tokens)
    third = grad * (torch.arange(num_tokens) < num_tokens // 3)
    hidden_leaf, weight_leaf = hidden.requires_grad_(), weight.requires_grad_()

    def score(head: Tensor = weight_leaf) -> Tensor:
        return (
            eager(hidden_leaf, head, targets)
            if impl == "eager"
            else linear_logprob(hidden_leaf, head, targets, impl=impl)
        )

    def train(upstream: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(score(), (hidden_leaf, weight_leaf), upstream))

    def train_frozen() -> list[Tensor]:
        return list(torch.autograd.grad(score(weight.detach()), hidden_leaf, grad))

    def scored() -> list[Tensor]:
        with torch.no_grad():
            return [score()]

    # Once before: the first call generates code and loads libraries.
    train(grad)
    memory_used = max(peak_beyond(scored), peak_beyond(lambda: train(grad)))
    h, w = hidden.detach(), weight.detach()
    logits, dhidden, dweight = torch.mm(h, w.T), torch.empty_like(h), torch.empty_like(w)
    runs: dict[str, Callable[[], object]] = {
        "forward": lambda: torch.mm(h, w.T, out=logits),
        "dhidden": lambda: torch.mm(logits, w, out=dhidden),
        "dweight": lambda: torch.mm(logits.T, h, out=dweight),
        "score": scored,
        "train": lambda: train(grad),
        "third": lambda: train(third),
        "frozen": train_frozen,
    }
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            seconds = cpu_seconds(run)
            if number:
                taken[name].append(seconds)
    s = {name: statistics.median(values) for name, values in taken.items()}
    products = s["forward"] + s["dhidden"] + s["dweight"]
    backward = (s["third"] - s["score"]) / (s["train"] - s["score"])
    return [
        ",".join(map(str, shape)),
        dtype,
        f"{s['forward']:.3f} {s['dhidden']:.3f} {s['dweight']:.3f}",
        f"{s['score']:.3f} ({s['score'] / s['forward']:.2f}x of 1)",
        f"{s['train']:.3f} ({s['train'] / (products + s['forward']):.2f}x of 4)",
        f"{s['third']:.3f}",
        f"{backward:.3f} of all",
        f"{s['frozen']:.3f} ({s['frozen'] / (2 * s['forward'] + s['dhidden']):.2f}x of 3)",
        f"{memory_used:.0f}",
    ]


def main() -> None:
    """Print the environment and a table with a row per shape and dtype."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--impl", default="cpu", help="an implementation, or eager")
    parser.add_argument("--dtype", default="bf16,fp32")
    parser.add_argument("--shape", nargs="+", default=["1024,576,49152"])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    reasons = {impl.value: state.reason for impl, state in available_impls().items()}
    print(f"{options.impl}: {reasons.get(options.impl, 'logits held whole')}")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}")
    print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|")
    for dtype in options.dtype.split(","):
        for text in options.shape:
            first, second, last = (int(size) for size in text.split(","))
            row = measure(options.impl, dtype, (first, second, last), options.rounds)
            print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
