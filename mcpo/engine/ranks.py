"""What engines of several processes have in common: their group, and values that cross it."""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def join_process_group(device: torch.device) -> None:
    """Enter the group that torchrun describes: NCCL between GPUs, gloo between CPUs."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


class Ranks:
    """This process among those of the default group."""

    def __init__(self, device: torch.device) -> None:
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self.device = device

    def sum(self, values: Tensor) -> Tensor:
        """Sum over ranks."""
        total = values.clone()
        dist.all_reduce(total)
        return total

    def largest(self, count: int) -> int:
        """The largest of the ranks' counts."""
        most = torch.tensor(count, device=self.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return int(most)

    def gather(self, value: T) -> list[T]:
        """Each rank's value, in order."""
        values: list[T] = [value] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait for every rank."""
        dist.barrier()
