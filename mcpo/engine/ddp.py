"""One process per device, whole weights everywhere: torch's DistributedDataParallel."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from mcpo.engine.ranks import Ranks
from mcpo.engine.whole import WholeWeights
from mcpo.policy import Policy


class DDPEngine(WholeWeights, Ranks):
    """Gradients averaged over ranks during the backward of the last micro-batch."""

    def __init__(
        self, policy: Policy, optimizer: torch.optim.Optimizer, device: torch.device
    ) -> None:
        Ranks.__init__(self, device)
        self.policy = policy
        self.optimizer = optimizer
        self._ddp = DistributedDataParallel(
            policy,
            device_ids=[device.index] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,
        )

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
