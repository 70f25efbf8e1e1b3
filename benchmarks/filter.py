"""What the gradient filter of the fused head saves on a real model, and what it costs in accuracy.

    OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=2 python -m benchmarks.filter

The hidden states are SmolLM2-135M-Instruct's on the completions of the default recipe's training
data, in bf16. A tile is one row by 64 columns of the vocabulary, what the filter decides about.
"""
# N scored tokens, Q panels of the vocabulary

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from mcpo.data import load_rows
from mcpo.models import SMOLLM2, load_model
from mcpo.tokens import TokenConfig, tokenize
from mcpo_kernels import linear_logprob
from mcpo_kernels.linear_logprob import ops
from mcpo_kernels.linear_logprob.head import PANEL

DATA = Path(__file__).parents[1] / "recipes" / "data" / "verifiable_train.jsonl"
MASSES = (0.0, 1e-5, 1e-4, 1e-3, 1e-2)


def scored_tokens(num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """(hidden [N, D], weight [V, D], targets [N]) of the first completions of the data, bf16."""
    model, tokenizer = load_model(SMOLLM2, dtype=torch.bfloat16)
    groups = tokenize(load_rows([str(DATA)]).rows, tokenizer, TokenConfig()).groups

    def rows() -> Iterator[tuple[Tensor, Tensor]]:
        for group in groups:
            for completion in group.candidate_ids:
                ids = torch.tensor([[*group.prompt_ids, *completion]])
                hidden = model.model(input_ids=ids).last_hidden_state[0]
                yield hidden[-len(completion) - 1 : -1], ids[0, -len(completion) :]

    hidden, targets, count = [], [], 0
    with torch.no_grad():
        for some, wanted in rows():
            hidden.append(some)
            targets.append(wanted)
            count += len(wanted)
            if count >= num_tokens:
                break
    weight = model.get_parameter("lm_head.weight").detach()
    return torch.cat(hidden)[:num_tokens], weight, torch.cat(targets)[:num_tokens]


def share_of_tiles(hidden: Tensor, weight: Tensor, targets: Tensor, filter_mass: float) -> float:
    """How much of [N, Q] the filter keeps, by its rule (docs/numerics.md)."""
    logp, lse, _, panel_lse = ops.linear_logprob(
        hidden, weight, targets, None, None, 1.0, 0.0, max(filter_mass, 1e-9), "cpu"
    )
    mass = (panel_lse - lse[:, None]).exp().double()
    ascending, order = mass.sort(dim=1)
    spared = -filter_mass * logp.double().expm1()
    left_out = (ascending.cumsum(1) <= spared[:, None]) & (filter_mass > 0)
    left_out &= order != targets[:, None] // PANEL
    return 1 - left_out.double().mean().item()


def main() -> None:
    """Print a table with a row per ``filter_mass``."""
    parser = argparse.ArgumentParser(description="What the gradient filter saves")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    hidden, weight, targets = scored_tokens(options.tokens)
    leaves = (hidden.requires_grad_(), weight.requires_grad_())
    grad = torch.linspace(-1.0, 1.0, options.tokens)

    def gradients(filter_mass: float) -> tuple[tuple[Tensor, ...], float]:
        logp = linear_logprob(*leaves, targets, filter_mass=filter_mass, impl="cpu")
        began = time.process_time()
        results = torch.autograd.grad(logp, leaves, grad)
        return results, (time.process_time() - began) / torch.get_num_threads()

    seconds: dict[float, list[float]] = {mass: [] for mass in MASSES}
    results = {mass: gradients(mass)[0] for mass in MASSES}
    for _ in range(options.rounds):
        for mass in MASSES:
            seconds[mass].append(gradients(mass)[1])
    whole = statistics.median(seconds[0.0])
    print(f"N, D, V = {len(targets)}, {weight.shape[1]}, {weight.shape[0]}; torch", end=" ")
    print(f"{torch.__version__}, {torch.get_num_threads()} threads, {options.rounds} rounds")
    print("| filter_mass | tiles multiplied | backward s | of the whole | dhidden | dweight |")
    print("|---|---|---|---|---|---|")
    for mass in MASSES:
        errors = (
            ((ours.double() - exact.double()).norm() / exact.double().norm()).item()
            for ours, exact in zip(results[mass], results[0.0], strict=True)
        )
        middle = statistics.median(seconds[mass])
        kept = share_of_tiles(hidden, weight, targets, mass)
        print(
            f"| {mass:g} | {kept:.1%} | {middle:.3f} | {middle / whole:.2f} | "
            + " | ".join(f"{error:.1e}" for error in errors)
            + " |"
        )


if __name__ == "__main__":
    main()
