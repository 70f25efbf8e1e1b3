"""Checkpoints: a folder appears whole or not at all, and the newest whole one is found on resume.

``checkpoint-<step>/`` holds the model, or the adapter, and the tokenizer as any Hugging Face loader
reads them, the optimizer, the schedule and what else training carries on (``optimizer.pt``), and
``state.json``. No generator state is kept: the order of rows and the draws are functions of (seed,
epoch, step, row id).
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mcpo import adapters

_NAME = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainState:
    """Where a run stands."""

    step: int
    """Optimizer steps done."""
    wall_s: float
    """Seconds of training so far, over all its processes' lives."""
    num_tokens: float
    """Tokens trained on so far."""
    identity: dict[str, Any]
    """What a resumed run must share with this one: see ``mcpo/identity.py``."""


def save(
    output_dir: Path,
    state: TrainState,
    *,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    training: dict[str, Any],
    keep: int,
) -> Path:
    """Write a checkpoint beside the others, then drop all but the ``keep`` newest.

    Args:
        output_dir: of the run.
        state: where it stands.
        model: saved with ``save_pretrained``, in the dtype it is trained in, or its adapter alone.
        tokenizer: saved with it.
        training: ``state_dict`` of the optimizer, of the schedule and of what else has a state.
        keep: how many checkpoints to leave.
    """
    final = output_dir / f"checkpoint-{state.step}"
    with _whole(final) as scratch:
        _write_model(model, scratch)
        tokenizer.save_pretrained(scratch)
        torch.save(training, scratch / "optimizer.pt")
        (scratch / "state.json").write_text(json.dumps(asdict(state), indent=2) + "\n")
    for old in _steps(output_dir)[:-keep]:
        shutil.rmtree(output_dir / f"checkpoint-{old}")
    return final


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write model and tokenizer so that any Hugging Face loader reads them, whole or not at all.

    Of a model with adapters it writes these alone.
    """
    with _whole(folder) as scratch:
        _write_model(model, scratch)
        tokenizer.save_pretrained(scratch)


def newest(output_dir: Path) -> Path | None:
    """The checkpoint with the highest step, or None."""
    steps = _steps(output_dir)
    return output_dir / f"checkpoint-{steps[-1]}" if steps else None


def read_state(folder: Path) -> TrainState:
    """``state.json`` of a checkpoint.

    Raises:
        ValueError: it is not there or holds something else.
    """
    try:
        return TrainState(**json.loads((folder / "state.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"{folder} must be a whole checkpoint to resume from, and its state.json cannot be "
            f"read ({error}); delete that folder to continue from the checkpoint before it"
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


def load_training(folder: Path) -> dict[str, Any]:
    """The state dicts under their names."""
    return torch.load(folder / "optimizer.pt", weights_only=True, map_location="cpu")


def _write_model(model: PreTrainedModel, folder: Path) -> None:
    if adapters.is_adapted(model):
        adapters.save(model, folder)
    else:
        model.save_pretrained(folder)


@contextmanager
def _whole(final: Path) -> Generator[Path]:
    """A scratch folder that becomes ``final`` once it is written and on the disk."""
    scratch = final.with_name(f".{final.name}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    yield scratch
    _flush_to_disk(scratch)
    shutil.rmtree(final, ignore_errors=True)
    scratch.rename(final)
    _sync(final.parent)


def _steps(output_dir: Path) -> list[int]:
    """Steps of the whole checkpoints, oldest first; unfinished ones have another name."""
    if not output_dir.is_dir():
        return []
    found = (_NAME.fullmatch(path.name) for path in output_dir.iterdir())
    return sorted(int(match[1]) for match in found if match)


def _flush_to_disk(folder: Path) -> None:
    """A rename must not become durable before the files it names."""
    for path in folder.iterdir():
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
