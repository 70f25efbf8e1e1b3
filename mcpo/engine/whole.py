"""Weights and optimizer where every rank has the whole of them, or can gather it."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mcpo import adapters
from mcpo.policy import Policy

OPTIMIZER = "optimizer.pt"


class WholeState(Mapping[str, Tensor]):
    """A state dict of shards that is whole to look at: a tensor is gathered when it is asked for.

    Args:
        state: with the parameters themselves, so that tied ones are known as one.
        gather: from a shard to the whole tensor, called by all ranks alike.
    """

    def __init__(self, state: Mapping[str, Tensor], gather: Callable[[Tensor], Tensor]) -> None:
        self._state = state
        self._gather = gather

    def __getitem__(self, name: str) -> Tensor:
        return self._gather(self._state[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)

    def to_host(self, *, keep: bool) -> dict[str, Tensor]:
        """All of them in host memory, tied ones once; every rank calls, one keeps."""
        found: dict[int, Tensor] = {}
        for shard in self._state.values():
            if id(shard) not in found:
                tensor = self._gather(shard)
                found[id(shard)] = tensor.cpu() if keep else torch.empty(0)
        return {name: found[id(shard)] for name, shard in self._state.items()} if keep else {}


class WholeWeights:
    """What engines have in common of which every rank has all weights, gradients and moments."""

    lockstep = False
    rank: int
    policy: Policy
    optimizer: torch.optim.Optimizer

    def rounds(self, count: int) -> int:
        """No forward or backward waits for another rank's."""
        return count

    def clip(self, max_norm: float) -> Tensor:
        """Scale the gradient down to ``max_norm``; returns its norm before."""
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
        """Write, from the first rank, the model as any loader reads it, and the optimizer."""
        if self.rank == 0:
            save(folder, self.policy.model, self.optimizer)

    def load(self, folder: Path) -> None:
        """Take up what ``save`` wrote, on every rank."""
        load(folder, self.policy.model, self.optimizer)


def on_host(state: Mapping[str, Tensor], *, keep: bool) -> Mapping[str, Tensor]:
    """A whole state in host memory, where it is kept; nothing on other ranks."""
    if isinstance(state, WholeState):
        return state.to_host(keep=keep)
    return state if keep else {}


def save(folder: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
    """Write the model, or its adapter, as any Hugging Face loader reads it, and the optimizer."""
    if adapters.is_adapted(model):
        adapters.save(model, folder)
    else:
        model.save_pretrained(folder)
    torch.save(optimizer.state_dict(), folder / OPTIMIZER)


def load(folder: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
    """Take up what ``save`` wrote.

    Raises:
        ValueError: a sharded engine wrote the folder, or its weights are not the model's.
    """
    if not (folder / OPTIMIZER).is_file():
        raise ValueError(
            f"{folder} must hold whole weights and {OPTIMIZER}, and a sharded engine wrote it; "
            "resume with that engine, or start anew in another output_dir"
        )
    load_weights(folder, model)
    optimizer.load_state_dict(read_state_dicts(folder / OPTIMIZER))


def read_state_dicts(path: Path) -> dict[str, Any]:
    """What ``torch.save`` wrote, without running any code of it.

    Raises:
        ValueError: the file cannot be read.
    """
    try:
        return torch.load(path, weights_only=True, map_location="cpu")
    # A file that is cut off, or is another's, fails in ways of its own.
    except (RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{path.parent} must be a whole checkpoint to resume from, and its {path.name} cannot "
            f"be read ({' '.join(str(error).split())[:200]}); delete that folder to continue from "
            "the checkpoint before it"
        ) from error


def load_weights(folder: Path, model: PreTrainedModel) -> None:
    """Copy a checkpoint's weights, or its adapter, into a model of the same class, all of them.

    Through ``from_pretrained``, which knows what ``save_pretrained`` renames (the experts of MoE
    models) and shards, and would start a weight it does not find anew.

    Raises:
        ValueError: weights are missing, or there are others.
    """
    if adapters.is_adapted(model):
        adapters.load(folder, model)
        return
    # Its type does not know that it returns a pair then.
    loaded: Any = type(model).from_pretrained(folder, dtype=model.dtype, output_loading_info=True)
    saved, found = loaded
    amiss = {what: names for what, names in found.items() if names}
    if amiss:
        raise ValueError(
            f"{folder} must hold every weight of {type(model).__name__} and no other, got {amiss}; "
            "delete that folder to continue from the checkpoint before it"
        )
    model.load_state_dict(saved.state_dict(), strict=True)
