"""Shards of weights and moments on disk: torch's distributed checkpoint, as safetensors.

``shards/`` of a checkpoint holds a file for each rank, with the tensors ``weight.NAME`` and, for
each of the optimizer's tensors, ``exp_avg.NAME`` and so on. Any number of ranks reads what any
number wrote, bit for bit: a shard is cut anew from those it overlaps. Nothing in it is pickled.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_state
from torch.distributed.checkpoint.state_dict_saver import save as save_state

FOLDER = "shards"


def save(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write this rank's shards; all ranks call it."""
    state = _weights(model) | {
        name: _at_least_1d(tensor) for name, tensor in _moments(model, optimizer).items()
    }
    writer = HuggingFaceStorageWriter(str(folder / FOLDER), save_distributed=True)
    save_state(state, storage_writer=writer)


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Read this rank's shards into the weights and the optimizer; all ranks call it.

    Raises:
        ValueError: the folder holds no shards, or not those of this model.
    """
    stored = Stored(folder)
    weights = _weights(model)
    stored.check({name: tuple(tensor.shape) for name, tensor in weights.items()})
    _make_moments(model, optimizer, stored)
    moments = _moments(model, optimizer)
    read = weights | {name: _at_least_1d(tensor) for name, tensor in moments.items()}
    load_state(read, storage_reader=stored.reader)


class Stored:
    """What ``shards/`` of a checkpoint holds, by whatever ranks wrote it.

    Raises:
        ValueError: there is no such folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        if not (folder / FOLDER).is_dir():
            raise ValueError(
                f"{folder} must hold {FOLDER}/, and an engine with whole weights wrote it; resume "
                "with that engine, or start anew in another output_dir"
            )
        self.reader = HuggingFaceStorageReader(str(folder / FOLDER))
        self._entries: dict[str, Any] = dict(self.reader.read_metadata().state_dict_metadata)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def whole(self, name: str) -> Tensor:
        """A tensor put together on the host, by this rank alone."""
        entry = self._entries[name]
        tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
        with warnings.catch_warnings():
            # That it loads in this process alone, which is what is asked for.
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            load_state({name: tensor}, storage_reader=self.reader, no_dist=True)
        return tensor

    def check(self, wanted: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse what a copy of slices would take in part, or fail on in the middle.

        Raises:
            ValueError: the weights are not those of the model.
        """
        found = {
            name: tuple(entry.size)
            for name, entry in self._entries.items()
            if name.startswith("weight.")
        }
        if dict(wanted) != found:
            every = {*wanted, *found}
            amiss = sorted(name for name in every if wanted.get(name) != found.get(name))
            raise ValueError(
                f"{self._folder} must hold every weight of the model in its shape and no other, "
                f"and it does not for {amiss[:3]}; delete that folder to continue from the "
                "checkpoint before it"
            )


def lasting(model: nn.Module) -> dict[str, Tensor]:
    """Weights and lasting buffers themselves, tied ones once."""
    once = {name for name, _ in model.named_parameters()}
    every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {
        name: tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if name in once or name not in every
    }


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """Under their names on disk; they share memory with the model's."""
    return {f"weight.{name}": tensor.detach() for name, tensor in lasting(model).items()}


def _moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{moment}.{name}": tensor
        for name, weight in model.named_parameters()
        for moment, tensor in optimizer.state.get(weight, {}).items()
    }


def _make_moments(model: nn.Module, optimizer: torch.optim.Optimizer, stored: Stored) -> None:
    """Room for what is stored."""
    for name, weight in model.named_parameters():
        optimizer.state.pop(weight, None)
        # A weight that never had a gradient has none.
        if f"step.{name}" in stored:
            optimizer.state[weight] = fresh_moments(weight)


def fresh_moments(weight: Tensor) -> dict[str, Tensor]:
    """What fused AdamW makes in its first step."""
    return {
        "step": torch.zeros((), dtype=torch.float32, device=weight.device),
        "exp_avg": torch.zeros_like(weight.detach()),
        "exp_avg_sq": torch.zeros_like(weight.detach()),
    }


def _at_least_1d(tensor: Tensor) -> Tensor:
    """A view; a file of slices has no tensor without a dimension."""
    return tensor.view(1) if tensor.dim() == 0 else tensor
