"""What ranks do for test_kernels_vocab_parallel.py, and the processes that are the ranks.

Apart from the tests, so that a rank starts without what pytest and conftest.py import.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import traceback
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from mcpo_kernels import linear_logprob, sequence_logprobs
from mcpo_kernels.linear_logprob import ops, vocab_parallel
from mcpo_kernels.testing import Case, Results

# A job that takes longer waits for a rank that will not come.
PATIENCE_S = 120


class World:
    """Processes that wait for functions of this file to run side by side."""

    def __init__(self, size: int, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=serve, args=(rank, size, folder / "store", theirs), daemon=True
            )
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, job: Callable[..., Any], *args: Any, **options: Any) -> list[Any]:
        """What ``job(rank, ...)`` returns on every rank; an exception is returned too."""
        for pipe in self.pipes:
            pipe.send_bytes(pickle.dumps((job, args, options)))
        if not all(pipe.poll(PATIENCE_S) for pipe in self.pipes):
            self.stop()
            raise TimeoutError(f"a rank did not return from {job.__name__}")
        return [pickle.loads(pipe.recv_bytes()) for pipe in self.pipes]

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def serve(rank: int, size: int, store: Path, pipe: Any) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    while True:
        job, args, options = pickle.loads(pipe.recv_bytes())
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                result = job(rank, *args, **options)
        except Exception as error:
            # Of these alone it is known that they are made of a message.
            known = type(error) in (ValueError, TypeError, RuntimeError)
            result = type(error)(str(error)) if known else RuntimeError(traceback.format_exc())
        pipe.send_bytes(pickle.dumps(result))


def slab_of(rank: int, case: Case, cut: list[int]) -> Case:
    rows = slice(cut[rank], cut[rank + 1])
    bias = None if case.bias is None else case.bias[rows]
    return replace(case, weight=case.weight[rows], bias=bias)


def leaf(tensor: Any, requires_grad: bool = True) -> Any:
    return None if tensor is None else tensor.detach().clone().requires_grad_(requires_grad)


def scores_of(case: Case, hidden: Any, weight: Any, bias: Any, **options: Any) -> torch.Tensor:
    head = {"bias": bias, "softcap": case.softcap, "scale": case.scale}
    return linear_logprob(hidden, weight, case.targets, **head, **options)


def evaluate_slab(
    rank: int,
    case: Case,
    cut: list[int],
    impl: str,
    *,
    frozen: tuple[str, ...] = (),
    **options: Any,
) -> tuple[Results, torch.Tensor]:
    """Results of this rank, None where frozen, and the value under no_grad."""
    case = slab_of(rank, case, cut)
    names = ("hidden", "weight", "bias")
    leaves = [leaf(getattr(case, name), name not in frozen) for name in names]
    options |= {"group": dist.group.WORLD, "impl": impl}
    logp = scores_of(case, *leaves, **options)
    logp.backward(case.grad)
    with torch.no_grad():
        scored = scores_of(case, *leaves, **options)
    grads = (None if tensor is None else tensor.grad for tensor in leaves)
    return Results(logp.detach(), *grads), scored


def evaluate_dtensors(rank: int, case: Case, placement: str, impl: str) -> list[Any]:
    """Value, gradients made whole, and what the rank holds of that of the weight."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    place = {"shard": Shard(0), "replicate": Replicate()}[placement]
    weight = distribute_tensor(case.weight, mesh, [place]).requires_grad_()
    bias = distribute_tensor(case.bias, mesh, [place]).requires_grad_()
    hidden = leaf(case.hidden)
    logp = scores_of(case, hidden, weight, bias, group=mesh, impl=impl)
    logp.backward(case.grad)
    assert isinstance(weight.grad, DTensor)
    assert weight.grad.placements == bias.grad.placements == (place,)
    assert weight.grad.shape == weight.shape
    local = weight.grad.to_local().shape[0]
    return [
        Results(logp.detach(), hidden.grad, weight.grad.full_tensor(), bias.grad.full_tensor()),
        local,
    ]


def refuse_dtensors(rank: int, case: Case, kind: str) -> Any:
    """Calls linear_logprob with what it refuses."""
    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (size,))
    weight = distribute_tensor(case.weight, mesh, [Shard(0)])
    bias = distribute_tensor(case.bias, mesh, [Shard(0)])
    hidden, group = case.hidden, dist.group.WORLD
    if kind == "no group":
        group = None
    elif kind == "by columns":
        weight = weight.redistribute(placements=[Shard(1)])
    elif kind == "partial":
        weight = DTensor.from_local(case.weight, mesh, [Partial()])
    elif kind == "bias whole":
        bias = bias.redistribute(placements=[Replicate()])
    elif kind == "hidden":
        weight, bias = weight.to_local(), bias.to_local()
        hidden = distribute_tensor(hidden, mesh, [Replicate()])
    elif kind == "mesh of two":
        group = init_device_mesh("cpu", (1, size), mesh_dim_names=("dp", "tp"))
    elif kind == "weight over two":
        both = init_device_mesh("cpu", (1, size), mesh_dim_names=("dp", "tp"))
        weight = distribute_tensor(case.weight, both, [Replicate(), Shard(0)])
    elif kind == "another order":
        backwards = DeviceMesh("cpu", list(reversed(range(size))))
        weight = distribute_tensor(case.weight, backwards, [Shard(0)])
    elif kind == "others":
        group = dist.new_group([0])
        # Rank 0 is in that group, where the weight is not.
    return linear_logprob(hidden, weight, case.targets, bias=bias, group=group, impl="chunked")


def differ(rank: int, case: Case, cut: list[int], kind: str) -> Any:
    """Rank 1 does not call or differentiate as the others do."""
    mine = slab_of(rank, case, cut)
    hidden, targets, options = leaf(mine.hidden), mine.targets, {}
    if rank == 1 and kind == "rows":
        hidden, targets = hidden[1:], targets[1:]
    elif rank == 1 and kind == "targets":
        targets = (targets + 1) % len(case.weight)
    elif rank == 1 and kind == "dtype":
        hidden, mine = hidden.float(), mine.to(torch.float32)
    elif rank == 1 and kind == "scale":
        options = {"scale": 2.0}
    elif kind == "out of range":
        targets = targets + len(case.weight)
    elif kind == "whole":
        mine = case
    elif kind == "reference":
        options = {"impl": "reference"}
    group = dist.group.WORLD
    logp = linear_logprob(hidden, mine.weight, targets, group=group, **options)
    if kind == "upstream":
        logp[: 3 + rank].sum().backward()
    return None


def train_on_other_rows(rank: int, case: Case, given: bool) -> Any:
    """FSDP2's weight outside its module, and rows of this rank; ``given``: with FSDP's mesh."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    module = torch.nn.Linear(*reversed(case.weight.shape), bias=False, dtype=torch.float64)
    fully_shard(module, mesh=mesh)
    hidden, targets = case.hidden + rank, case.targets.roll(rank)
    return linear_logprob(hidden, module.weight, targets, group=mesh if given else None)


def sum_parts(rank: int, parts: list[torch.Tensor], grad: torch.Tensor) -> torch.Tensor:
    return vocab_parallel.sum_over_group(parts[rank], grad, dist.group.WORLD.group_name)


def second_derivative(rank: int, case: Case, cut: list[int]) -> None:
    case = slab_of(rank, case, cut)
    hidden = leaf(case.hidden)
    total = linear_logprob(hidden, case.weight, case.targets, group=dist.group.WORLD).sum()
    (first,) = torch.autograd.grad(total, hidden, create_graph=True)
    first.sum().backward()


def backward_alone(rank: int, case: Case, cut: list[int]) -> Any:
    """With frozen hidden states a rank needs no other to differentiate."""
    case = slab_of(rank, case, cut)
    weight = leaf(case.weight)
    logp = linear_logprob(case.hidden, weight, case.targets, group=dist.group.WORLD)
    if rank == 0:
        logp.backward(case.grad)
    return weight.grad


def subgroup(rank: int, case: Case, cut: list[int]) -> Any:
    group = dist.new_group([0, 1])
    if rank == 2:
        return linear_logprob(case.hidden, case.weight, case.targets, group=group)
    case = slab_of(rank, case, cut)
    return linear_logprob(case.hidden, case.weight, case.targets, group=group)


def sequence_sums(rank: int, case: Case, cut: list[int], seq_ids: torch.Tensor) -> Any:
    case = slab_of(rank, case, cut)
    group = dist.group.WORLD
    return sequence_logprobs(case.hidden, case.weight, case.targets, seq_ids, 4, group=group)


def compile_it(rank: int, case: Case, cut: list[int], impl: str, kind: str) -> list[list[Any]]:
    """Results of the function as it is and compiled."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    group = mesh if kind == "mesh" else dist.group.WORLD

    def loss(hidden, weight, bias):
        logp = scores_of(case, hidden * 2, weight, bias, group=group, impl=impl)
        return (logp * logp * case.grad).sum()

    if kind == "dtensor":
        group = mesh
        mine = replace(
            case,
            weight=distribute_tensor(case.weight, mesh, [Shard(0)]),
            bias=distribute_tensor(case.bias, mesh, [Shard(0)]),
        )
    else:
        mine = slab_of(rank, case, cut)
    results = []
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for function in (loss, compiled):
        leaves = [leaf(mine.hidden), leaf(mine.weight), leaf(mine.bias)]
        # What torch itself says of its own backward while AOTAutograd traces it.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = function(*leaves)
            value.backward()
        grads = [tensor.grad for tensor in leaves]
        local = [each.to_local() if isinstance(each, DTensor) else each for each in grads]
        results.append([value.detach(), *local])
    return results


def check_ops(rank: int, case: Case, cut: list[int], impl: str) -> None:
    case = slab_of(rank, case, cut)
    hidden, weight = leaf(case.hidden), leaf(case.weight)
    name = dist.group.WORLD.group_name
    for cache_mb, filter_mass in ((0.0, 0.0), (1.0, 0.1)):
        options = (4.0, 0.7, cache_mb, filter_mass, impl, name)
        arguments = (hidden, weight, case.targets, case.bias, *options)
        torch.library.opcheck(vocab_parallel.vocab_parallel_logprob, arguments)
    arguments = (case.hidden, case.grad, name)
    torch.library.opcheck(vocab_parallel.sum_over_group, arguments)
    assert ops.IMPLEMENTATIONS[impl]
