"""One process per device, whole weights everywhere: torch's DistributedDataParallel."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from mcpo.policy import Policy

T = TypeVar("T")


def join_process_group(device: torch.device) -> None:
    """Enter the group that torchrun describes: NCCL between GPUs, gloo between CPUs."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


class DDPEngine:
    """Gradients averaged over ranks during the backward of the last micro-batch."""

    def __init__(
        self, policy: Policy, optimizer: torch.optim.Optimizer, device: torch.device
    ) -> None:
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self.device = device
        self.optimizer = optimizer
        self._ddp = DistributedDataParallel(
            policy,
            device_ids=[device.index] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,
        )

    @property
    def policy(self) -> Policy:
        """The wrapped policy."""
        module = self._ddp.module
        assert isinstance(module, Policy)
        return module

    @contextmanager
    def micro_step(self, *, last: bool) -> Generator[None]:
        """Keep gradients local until the last micro-batch, however many a rank has."""
        if last:
            yield
        else:
            with self._ddp.no_sync():
                yield

    def __call__(self, *arguments: object) -> Tensor:
        """The policy's forward through DDP, whose hooks reduce the gradients."""
        return self._ddp(*arguments)

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients; the factor undoes DDP's mean, as the loss is a sum over ranks."""
        (loss * self.world_size).backward()

    def sum(self, values: Tensor) -> Tensor:
        """Sum over ranks."""
        total = values.clone()
        dist.all_reduce(total)
        return total

    def gather(self, value: T) -> list[T]:
        """Each rank's value, in order."""
        values: list[T] = [value] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait for every rank."""
        dist.barrier()
