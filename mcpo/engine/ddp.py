"""One process per device, whole weights everywhere: torch's DistributedDataParallel."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from mcpo.engine import whole
from mcpo.engine.ranks import Ranks
from mcpo.policy import Policy


class DDPEngine(Ranks):
    """Gradients averaged over ranks during the backward of the last micro-batch."""

    lockstep = False

    def __init__(
        self, policy: Policy, optimizer: torch.optim.Optimizer, device: torch.device
    ) -> None:
        super().__init__(device)
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

    def rounds(self, count: int) -> int:
        """Gradients wait for the last micro-batch, however many a rank has."""
        return count

    @contextmanager
    def micro_step(self, *, last: bool) -> Generator[None]:
        """Keep gradients local until the last micro-batch."""
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

    def clip(self, max_norm: float) -> Tensor:
        """Scale the gradient down to ``max_norm``; every rank has the whole of it."""
        return torch.nn.utils.clip_grad_norm_(self.policy.parameters(), max_norm)

    def update(self) -> None:
        """Take the optimizer's step, the same on every rank, and drop the gradients."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def together(self) -> AbstractContextManager[None]:
        """A forward without gradients needs no other rank."""
        return nullcontext()

    def whole_state(self) -> Mapping[str, Tensor]:
        """The model's state dict."""
        return self.policy.model.state_dict()

    def save(self, folder: Path) -> None:
        """Write from the first rank what a single process would."""
        if self.rank == 0:
            whole.save(folder, self.policy.model, self.optimizer)

    def load(self, folder: Path) -> None:
        """Take up what ``save`` wrote, on every rank."""
        whole.load(folder, self.policy.model, self.optimizer)
