"""One process, one device."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from mcpo.engine import whole
from mcpo.policy import Policy

T = TypeVar("T")


class SingleEngine:
    """The policy as it is: no wrapping, no communication."""

    rank = 0
    world_size = 1
    lockstep = False

    def __init__(
        self, policy: Policy, optimizer: torch.optim.Optimizer, device: torch.device
    ) -> None:
        self.policy = policy
        self.optimizer = optimizer
        self.device = device

    def rounds(self, count: int) -> int:
        """One rank waits for nobody."""
        return count

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

    def clip(self, max_norm: float) -> Tensor:
        """Scale the gradient down to ``max_norm``; returns its norm before."""
        return torch.nn.utils.clip_grad_norm_(self.policy.parameters(), max_norm)

    def update(self) -> None:
        """Take the optimizer's step and drop the gradients."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def together(self) -> AbstractContextManager[None]:
        """One rank waits for nobody."""
        return nullcontext()

    def whole_state(self) -> Mapping[str, Tensor]:
        """The model's state dict."""
        return self.policy.model.state_dict()

    def save(self, folder: Path) -> None:
        """Write the model as any Hugging Face loader reads it, and the optimizer beside it."""
        whole.save(folder, self.policy.model, self.optimizer)

    def load(self, folder: Path) -> None:
        """Take up what ``save`` wrote."""
        whole.load(folder, self.policy.model, self.optimizer)

    def sum(self, values: Tensor) -> Tensor:
        """One rank: the values themselves."""
        return values

    def gather(self, value: T) -> list[T]:
        """One rank: one value."""
        return [value]

    def barrier(self) -> None:
        """One rank: nothing to wait for."""
