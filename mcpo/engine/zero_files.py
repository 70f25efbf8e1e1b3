"""ZeRO's weights and moments on disk, in the files and names of ``sharded_files.py``.

The first rank writes whole tensors, gathered one after the other, and every rank reads them back
and keeps its part. So what one stage and number of ranks wrote another takes up, and so does FSDP2.
DeepSpeed's own checkpoints are pickles, tied to their number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mcpo.engine import sharded_files
from mcpo.engine.lockstep import TINY
from mcpo.pack import move, pack

if TYPE_CHECKING:
    from mcpo.engine.zero import ZeroEngine

MOMENTS = ("exp_avg", "exp_avg_sq")
# Of a file, and so of what the first rank holds besides its shards.
BYTES_PER_FILE = 2**31


def save(engine: ZeroEngine, folder: Path) -> None:
    """Gather everything, write it from the first rank; all ranks call it."""
    path = folder / sharded_files.FOLDER
    if engine.rank == 0:
        path.mkdir()
    waiting: dict[str, Tensor] = {}
    number = 0
    for name, tensor in _tensors(engine):
        if engine.rank:
            continue
        waiting[name] = tensor.to("cpu", copy=True).contiguous()
        if sum(kept.nbytes for kept in waiting.values()) >= BYTES_PER_FILE:
            save_file(waiting, path / f"whole-{number:05d}.safetensors")
            waiting, number = {}, number + 1
    if waiting:
        save_file(waiting, path / f"whole-{number:05d}.safetensors")


def load(engine: ZeroEngine, folder: Path) -> None:
    """Read everything on every rank, a tensor at a time, and keep this rank's part of it.

    Raises:
        ValueError: the folder holds no shards, or not those of this model.
    """
    stored = sharded_files.Stored(folder)
    shapes = {f"weight.{name}": _shape(tensor) for name, tensor in engine.lasting_state().items()}
    stored.check(shapes)
    for name, tensor in engine.lasting_state().items():
        engine.set_weight(tensor, stored.whole(f"weight.{name}"))
    # A step that changes nothing: it publishes the weights and makes room for the moments.
    _idle_step(engine)
    steps: list[float] = []
    for name, weight in engine.policy.model.named_parameters():
        # Of a weight that had no gradient on any rank there are none, and ZeRO has zeros.
        for moment in MOMENTS if weight.requires_grad else ():
            found = f"{moment}.{name}" in stored
            value = stored.whole(f"{moment}.{name}") if found else torch.zeros(_shape(weight))
            engine.set_moment(weight, moment, value)
        if f"step.{name}" in stored:
            steps.append(float(stored.whole(f"step.{name}")))
    for state in engine.optimizer.state.values():
        state["step"].fill_(max(steps, default=0.0))


def _tensors(engine: ZeroEngine) -> Iterator[tuple[str, Tensor]]:
    """Weights, then moments, each gathered by all ranks as it is yielded."""
    whole = engine.whole_state()
    for name in engine.lasting_state():
        yield f"weight.{name}", whole[name]
    states = list(engine.optimizer.state.values())
    if not states:
        return
    for name, weight in engine.policy.model.named_parameters():
        if weight.requires_grad:
            for moment in MOMENTS:
                yield f"{moment}.{name}", engine.moment(weight, moment)
            yield f"step.{name}", torch.as_tensor(states[0]["step"]).reshape(1)


def _idle_step(engine: ZeroEngine) -> None:
    rates = [group["lr"] for group in engine.optimizer.param_groups]
    for group in engine.optimizer.param_groups:
        group["lr"] = 0.0
    batch = move(pack([TINY], share_prefix=True), engine.device)
    with engine.micro_step(last=True):
        engine.backward(engine(batch).sum() * 0.0)
    engine.update()
    for group, rate in zip(engine.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _shape(tensor: Any) -> tuple[int, ...]:
    """Of the whole, which in stage 3 a weight knows under a name of its own."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))
