"""What test_recompute.py runs: a step of DDP and of FSDP2 in every mode, against one process.

torchrun --nproc-per-node 2 tests/sharded_step.py
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch
import torch.distributed as dist
from conftest import build_model
from test_step import GROUPS
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import logsigmoid
from torch.nn.parallel import DistributedDataParallel

from mcpo.pack import pack
from mcpo.policy import Policy

# Of four prompts the first pool candidate is drawn.
BATCHES = [pack([group], share_prefix=True) for group in GROUPS[:4]]
Step = Callable[[Policy, list[int]], None]
MODES = ("none", "light", "selective", "full")


def policy_in(mode: str, *, frozen: bool) -> Policy:
    policy = Policy(
        build_model().double().train(), head_impl="auto", autocast_dtype=None, recompute=mode
    )
    if frozen:
        policy.model.get_input_embeddings().requires_grad_(False)
    return policy


def go_back(policy: Policy, module: torch.nn.Module, numbers: list[int]) -> None:
    """Forward and backward of these prompts, each a micro-batch."""
    for number in numbers:
        batch = BATCHES[number]
        recompute = policy.recompute_of(batch)
        logp_S = module(batch, recompute)
        if recompute is not None and policy.recompute != "full":
            recompute.choose(batch.segment_of_S[:2])
        (-logsigmoid(logp_S[0] - logp_S[1])).backward()


def whole_gradients(policy: Policy) -> dict[str, torch.Tensor]:
    found = {}
    for name, weight in policy.named_parameters():
        gradient = weight.grad
        if gradient is not None:
            found[name] = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
    return found


def step_of_ddp(policy: Policy, numbers: list[int]) -> None:
    """Gradients are reduced in the last micro-batch."""
    module = DistributedDataParallel(policy, gradient_as_bucket_view=True)
    with module.no_sync():
        go_back(policy, module, numbers[:-1])
    go_back(policy, module, numbers[-1:])


def step_of_fsdp2(policy: Policy, numbers: list[int]) -> None:
    for layer in policy.model.model.layers:
        fully_shard(layer)
    fully_shard(policy)
    go_back(policy, policy, numbers)


def check(mode: str, step: Step, *, frozen: bool) -> None:
    alone = policy_in("none", frozen=frozen)
    go_back(alone, alone, [0, 1, 2, 3])
    expected = whole_gradients(alone)
    policy = policy_in(mode, frozen=frozen)
    size = dist.get_world_size()
    step(policy, list(range(dist.get_rank(), 4, size)))
    found = whole_gradients(policy)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        # Both average over ranks. Llama's norms compute in float32 whatever the weights.
        error = (found[name] * size - gradient).abs().max()
        assert error <= 1e-5 * gradient.abs().max(), (mode, frozen, name, float(error))


def main() -> None:
    for mode, step, frozen in product(MODES, (step_of_ddp, step_of_fsdp2), (False, True)):
        check(mode, step, frozen=frozen)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    dist.destroy_process_group()
