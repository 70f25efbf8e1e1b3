"""Checkpoints: a folder appears whole or not at all, and the newest whole one is found on resume.

``checkpoint-<step>/`` holds the weights, or the adapter, and the optimizer as the engine writes
them, the tokenizer, the schedule and what else training carries on (``training.pt``), and
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
from transformers import PreTrainedTokenizerBase

from mcpo import adapters
from mcpo.engine import Engine
from mcpo.engine.whole import on_host, read_state_dicts

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
    engine: Engine,
    output_dir: Path,
    state: TrainState,
    *,
    tokenizer: PreTrainedTokenizerBase,
    training: dict[str, Any],
    keep: int,
) -> Path:
    """Write a checkpoint beside the others, then drop all but the ``keep`` newest.

    All ranks call it, and see one ``output_dir``.

    Args:
        engine: writes weights and optimizer.
        output_dir: of the run.
        state: where it stands.
        tokenizer: saved with it.
        training: ``state_dict`` of the schedule and of whatever else must go on where it was; the
            first rank's is kept.
        keep: how many checkpoints to leave.
    """
    final = folder_of(output_dir, state.step)
    with _whole(engine, final) as scratch:
        engine.save(scratch)
        if engine.rank == 0:
            tokenizer.save_pretrained(scratch)
            torch.save(training, scratch / "training.pt")
            (scratch / "state.json").write_text(json.dumps(asdict(state), indent=2) + "\n")
    if engine.rank == 0:
        for old in _steps(output_dir)[:-keep]:
            shutil.rmtree(output_dir / f"checkpoint-{old}")
    engine.barrier()
    return final


def folder_of(output_dir: Path, step: int) -> Path:
    """The checkpoint of a step, whether or not it is there."""
    return output_dir / f"checkpoint-{step}"


def save_model(engine: Engine, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write model and tokenizer so that any Hugging Face loader reads them, whole or not at all.

    Of a model with adapters these alone are written. All ranks call it. The first one holds the
    whole model in host memory meanwhile.
    """
    model = engine.policy.model
    adapted = adapters.is_adapted(model)
    state = {} if adapted else on_host(engine.whole_state(), keep=engine.rank == 0)
    with _whole(engine, folder) as scratch:
        if engine.rank == 0:
            if adapted:
                adapters.save(model, scratch)
            else:
                model.save_pretrained(scratch, state_dict=dict(state))
            tokenizer.save_pretrained(scratch)


def save_merged(engine: Engine, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the model with its adapters multiplied into it, as ``save_model`` does."""
    with _whole(engine, folder) as scratch:
        if engine.rank == 0:
            adapters.merged_model(engine.policy.model).save_pretrained(scratch)
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


def load_training(folder: Path) -> dict[str, Any]:
    """The state dict of the schedule, and of whatever else was saved with it."""
    return read_state_dicts(folder / "training.pt")


@contextmanager
def _whole(engine: Engine, final: Path) -> Generator[Path]:
    """A scratch folder that becomes ``final`` once all ranks have written and it is on the disk."""
    scratch = final.with_name(f".{final.name}.tmp")
    if engine.rank == 0:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
    engine.barrier()
    yield scratch
    # Each rank its own files where it can: one machine's cache knows nothing of another's.
    _flush_to_disk(scratch)
    engine.barrier()
    if engine.rank == 0:
        shutil.rmtree(final, ignore_errors=True)
        scratch.rename(final)
        _sync(final.parent)
    engine.barrier()


def _steps(output_dir: Path) -> list[int]:
    """Steps of the whole checkpoints, oldest first; unfinished ones have another name."""
    if not output_dir.is_dir():
        return []
    found = (_NAME.fullmatch(path.name) for path in output_dir.iterdir())
    return sorted(int(match[1]) for match in found if match)


def _flush_to_disk(folder: Path) -> None:
    """A rename must not become durable before the files it names."""
    for path in folder.rglob("*"):
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
