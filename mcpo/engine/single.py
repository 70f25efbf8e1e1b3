"""One process, one device."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor

from mcpo.engine.whole import WholeWeights
from mcpo.policy import Policy

T = TypeVar("T")


class SingleEngine(WholeWeights):
    """The policy as it is: no wrapping, no communication."""

    rank = 0
    world_size = 1

    def __init__(
        self, policy: Policy, optimizer: torch.optim.Optimizer, device: torch.device
    ) -> None:
        self.policy = policy
        self.optimizer = optimizer
        self.device = device

    def micro_step(self, *, last: bool) -> AbstractContextManager[None]:
        """Nothing to reduce."""
        del last
        return nullcontext()

    def __call__(self, *arguments: object) -> Tensor:
        """The policy's forward."""
        return self.policy(*arguments)

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients."""
        loss.backward()

    def sum(self, values: Tensor) -> Tensor:
        """One rank: the values themselves."""
        return values

    def gather(self, value: T) -> list[T]:
        """One rank: one value."""
        return [value]

    def barrier(self) -> None:
        """One rank: nothing to wait for."""
