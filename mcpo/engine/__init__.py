"""Who runs a step: the few verbs the trainer needs, over torch's own engines."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from mcpo.policy import Policy

T = TypeVar("T")


class Engine(Protocol):
    """What ``step.py``, ``loop.py`` and ``run.py`` ask of an engine."""

    rank: int
    world_size: int
    device: torch.device
    optimizer: torch.optim.Optimizer

    @property
    def policy(self) -> Policy:
        """The policy itself, for saving, decoding and evaluation without gradient."""
        ...

    def micro_step(self, *, last: bool) -> AbstractContextManager[None]:
        """Surrounds forward and backward of a micro-batch; the last one reduces gradients."""
        ...

    def __call__(self, *arguments: object) -> Tensor:
        """The policy's forward, with the engine's hooks."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of this rank's share of a loss that is summed over ranks."""
        ...

    def sum(self, values: Tensor) -> Tensor:
        """Sum over ranks."""
        ...

    def gather(self, value: T) -> list[T]:
        """Each rank's value, in order, on every rank; any picklable object."""
        ...

    def barrier(self) -> None:
        """Wait for every rank."""
        ...


def launched_by_torchrun() -> bool:
    """Whether this process is one of a group: torchrun sets these variables."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def rank() -> int:
    """This process among all of the job."""
    return int(os.environ["RANK"]) if launched_by_torchrun() else 0


def world_size() -> int:
    """Processes of the job."""
    return int(os.environ["WORLD_SIZE"]) if launched_by_torchrun() else 1


def local_rank() -> int:
    """This process among those of its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """Processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
