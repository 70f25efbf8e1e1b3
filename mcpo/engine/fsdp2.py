"""One process per device, each with a shard of every weight: torch's fully_shard (FSDP2).

A group of weights is whole on every rank while its module runs, forward or backward, and sharded
otherwise; gradients and the optimizer's moments are shards always. All ranks must gather the same
groups in the same order, so they make the same number of forwards: training by ``rounds``, the rest
by ``together``.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from mcpo.engine import sharded_files
from mcpo.engine.lockstep import run_along
from mcpo.engine.ranks import Ranks
from mcpo.engine.whole import WholeState
from mcpo.policy import Policy


class FSDP2Engine(Ranks):
    """A sharded policy; the loss is a sum over ranks, and so are its gradients.

    Args:
        policy: sharded by ``sharding.shard``.
        optimizer: made of the sharded weights.
        device: of this rank.
        whole_gradients: keep the gradients of micro-batches whole on every rank and reduce them
            once, in the last one. Less communication, and the memory of a whole gradient.
    """

    lockstep = True

    def __init__(
        self,
        policy: Policy,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        *,
        whole_gradients: bool = False,
    ) -> None:
        super().__init__(device)
        self.policy = policy
        self.optimizer = optimizer
        self._whole_gradients = whole_gradients

    def rounds(self, count: int) -> int:
        """A forward gathers weights from all ranks, so each runs as many as any of them."""
        return self.largest(count)

    @contextmanager
    def micro_step(self, *, last: bool) -> Generator[None]:
        """Gradients are reduced to shards in every micro-batch, unless whole ones are kept."""
        if self._whole_gradients:
            for module in sharded_modules(self.policy):
                module.set_requires_gradient_sync(last, recurse=False)
        yield

    def __call__(self, *arguments: object) -> Tensor:
        """The policy's forward, whose hooks gather weights."""
        return self.policy(*arguments)

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients; the factor undoes the mean over ranks."""
        (loss * self.world_size).backward()

    def clip(self, max_norm: float) -> Tensor:
        """Scale the gradient down to ``max_norm``; its norm is over all shards of all ranks."""
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), max_norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def update(self) -> None:
        """Take the optimizer's step on this rank's shards and drop their gradients."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def together(self) -> AbstractContextManager[None]:
        """Ranks that are done run along until all are; then no weight is whole any more."""
        return run_along(self, lambda: release(self.policy))

    def whole_state(self) -> Mapping[str, Tensor]:
        """The model's state dict, a tensor gathered on every rank when it is looked up."""
        release(self.policy)
        return WholeState(self.policy.model.state_dict(keep_vars=True), gathered)

    def save(self, folder: Path) -> None:
        """Write this rank's shards of weights and moments as safetensors."""
        release(self.policy)
        sharded_files.save(folder, self.policy.model, self.optimizer)

    def load(self, folder: Path) -> None:
        """Take up what any number of ranks wrote."""
        release(self.policy)
        sharded_files.load(folder, self.policy.model, self.optimizer)


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a shard, by all ranks together; other tensors are whole already."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def release(policy: Policy) -> None:
    """Let go of every weight that a forward without backward left whole."""
    for module in sharded_modules(policy):
        module.reshard()


def sharded_modules(policy: Policy) -> list[FSDPModule]:
    """The roots of its groups."""
    return [module for module in policy.modules() if isinstance(module, FSDPModule)]
