"""What a run reports as it goes: a JSON line per logged step, a tracker, memory in use."""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from mcpo.config import RunConfig

Track = Callable[[Mapping[str, float], int], None]


class MetricsFile:
    """``metrics.jsonl`` of a run; on resume, lines of steps that will be run again are dropped."""

    def __init__(self, output_dir: Path, *, from_step: int) -> None:
        output_dir.mkdir(parents=True, exist_ok=True)
        path = output_dir / "metrics.jsonl"
        kept = [line for line in read_metrics(path) if line["step"] <= from_step]
        # Replaced whole: a kill in between leaves the old file.
        scratch = path.with_suffix(".tmp")
        scratch.write_text("".join(json.dumps(line) + "\n" for line in kept if from_step))
        scratch.replace(path)
        self._file = path.open("a")

    def write(self, metrics: Mapping[str, float | int]) -> None:
        """Append one line and hand it to the operating system."""
        self._file.write(json.dumps(metrics) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file, a torn last one left out; empty if there is none."""
    lines: list[dict[str, Any]] = []
    if path.exists():
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                lines.append(json.loads(line))
    return lines


def tracker(config: RunConfig, settings: Mapping[str, Any]) -> Track:
    """The function that sends metrics to the tracker of ``report_to``.

    Raises:
        ModuleNotFoundError: the tracker's package is not installed.
    """
    if config.report_to == "none":
        return lambda metrics, step: None
    try:
        return _TRACKERS[config.report_to](config, settings)
    except ImportError as error:
        raise ModuleNotFoundError(
            f"report_to={config.report_to} needs its package, which is not installed; "
            f"run `pip install {config.report_to}` or set report_to to none"
        ) from error


def _tensorboard(config: RunConfig, settings: Mapping[str, Any]) -> Track:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(config.output_dir)
    writer.add_text("config", json.dumps(settings, indent=2, default=str))

    def track(metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return track


def _wandb(config: RunConfig, settings: Mapping[str, Any]) -> Track:
    import wandb  # pyright: ignore[reportMissingImports]: an optional tracker

    run = wandb.init(project="mcpo", name=config.output_dir, config=dict(settings))
    return lambda metrics, step: run.log(dict(metrics), step=step)


_TRACKERS: dict[str, Callable[[RunConfig, Mapping[str, Any]], Track]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
}


def peak_memory_mb(device: torch.device) -> float:
    """Largest memory so far, in MB (1e6 bytes): allocated on a GPU, resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
