"""Who runs a step: the few verbs the trainer needs, over torch's own engines."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
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
    lockstep: bool
    """Whether a forward needs all ranks."""

    @property
    def policy(self) -> Policy:
        """The policy itself, for saving, decoding and evaluation without gradient."""
        ...

    def rounds(self, count: int) -> int:
        """Micro-batches to run in a step of which this rank has ``count``.

        More where a forward or backward needs all ranks: each runs as many as any of them.
        """
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

    def clip(self, max_norm: float) -> Tensor:
        """Scale the gradient down to ``max_norm``; returns its norm before, equal on every rank."""
        ...

    def update(self) -> None:
        """Take the optimizer's step and drop the gradients."""
        ...

    def together(self) -> AbstractContextManager[None]:
        """Inside, ranks may make different numbers of forwards without gradients.

        Leaving waits for the others where a forward needs all ranks.
        """
        ...

    def whole_state(self) -> Mapping[str, Tensor]:
        """The model's state dict, each tensor whole and gathered when it is looked up.

        Where weights are sharded, every rank must look up the same names in the same order.
        """
        ...

    def save(self, folder: Path) -> None:
        """Write weights and optimizer into a folder that all ranks see, each rank its part."""
        ...

    def load(self, folder: Path) -> None:
        """Take up what ``save`` wrote.

        Raises:
            ValueError: another kind of engine wrote it, or its weights are not the model's.
        """
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
