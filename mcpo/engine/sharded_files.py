"""Shards of weights and moments on disk: torch's distributed checkpoint, as safetensors.

``shards/`` of a checkpoint holds a file for each rank, with the tensors ``weight.NAME`` and, for
each of the optimizer's tensors, ``exp_avg.NAME`` and so on. Any number of ranks reads what any
number wrote, bit for bit: a shard is cut anew from those it overlaps. Nothing in it is pickled.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter

FOLDER = "shards"


def save(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write this rank's shards; all ranks call it."""
    state = _weights(model) | {
        name: _at_least_1d(tensor) for name, tensor in _moments(model, optimizer).items()
    }
    writer = HuggingFaceStorageWriter(str(folder / FOLDER), save_distributed=True)
    dcp.save(state, storage_writer=writer)


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Read this rank's shards into the weights and the optimizer; all ranks call it.

    Raises:
        ValueError: the folder holds no shards, or not those of this model.
    """
    if not (folder / FOLDER).is_dir():
        raise ValueError(
            f"{folder} must hold {FOLDER}/, and an engine with whole weights wrote it; resume with "
            "that engine, or start anew in another output_dir"
        )
    reader = HuggingFaceStorageReader(str(folder / FOLDER))
    stored = reader.read_metadata().state_dict_metadata
    weights = _weights(model)
    _check(folder, weights, stored)
    _make_moments(model, optimizer, stored.keys())
    moments = _moments(model, optimizer)
    read = weights | {name: _at_least_1d(tensor) for name, tensor in moments.items()}
    dcp.load(read, storage_reader=reader)


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """Weights and lasting buffers, tied ones once; they share memory with the model's."""
    once = {name for name, _ in model.named_parameters()}
    every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {
        f"weight.{name}": tensor
        for name, tensor in model.state_dict().items()
        if name in once or name not in every
    }


def _moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{moment}.{name}": tensor
        for name, weight in model.named_parameters()
        for moment, tensor in optimizer.state.get(weight, {}).items()
    }


def _make_moments(
    model: nn.Module, optimizer: torch.optim.Optimizer, stored: Collection[str]
) -> None:
    """Room for what is stored, of the kinds that the optimizer's first step would make."""
    for name, weight in model.named_parameters():
        optimizer.state.pop(weight, None)
        if f"step.{name}" not in stored:
            continue
        optimizer.state[weight] = {
            "step": torch.zeros((), dtype=torch.float32, device=weight.device),
            "exp_avg": torch.zeros_like(weight.detach()),
            "exp_avg_sq": torch.zeros_like(weight.detach()),
        }


def _check(folder: Path, weights: dict[str, Tensor], stored: Mapping[str, Any]) -> None:
    """Refuse what a copy of slices would take in part, or fail on in the middle."""
    wanted = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    found = {
        name: tuple(entry.size) for name, entry in stored.items() if name.startswith("weight.")
    }
    if wanted != found:
        amiss = sorted(name for name in wanted | found if wanted.get(name) != found.get(name))
        raise ValueError(
            f"{folder} must hold every weight of the model in its shape and no other, got others "
            f"for {amiss[:3]}; delete that folder to continue from the checkpoint before it"
        )


def _at_least_1d(tensor: Tensor) -> Tensor:
    """A view; a file of slices has no tensor without a dimension."""
    return tensor.view(1) if tensor.dim() == 0 else tensor
