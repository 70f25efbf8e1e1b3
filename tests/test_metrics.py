from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mcpo.config import RunConfig
from mcpo.metrics import MetricsFile, peak_memory_mb, read_metrics, tracker


def test_lines_come_back_and_resume_drops_what_runs_again(tmp_path: Path) -> None:
    first = MetricsFile(tmp_path, from_step=0)
    for step in (1, 2, 3):
        first.write({"step": step, "loss": 0.5 / step})
    first.close()
    resumed = MetricsFile(tmp_path, from_step=2)
    resumed.write({"step": 3, "loss": 9.0})
    resumed.close()
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert lines == [
        {"step": 1, "loss": 0.5},
        {"step": 2, "loss": 0.25},
        {"step": 3, "loss": 9.0},
    ]


def test_a_fresh_run_starts_an_empty_file(tmp_path: Path) -> None:
    for _ in range(2):
        file = MetricsFile(tmp_path, from_step=0)
        file.write({"step": 1})
        file.close()
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1}]


def test_no_tracker_by_default() -> None:
    tracker(RunConfig(), {})({"loss": 1.0}, 1)


def test_an_absent_tracker_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(ModuleNotFoundError, match=r"report_to=wandb needs its package"):
        tracker(RunConfig(report_to="wandb"), {})


def test_peak_memory_grows_with_what_is_held() -> None:
    before = peak_memory_mb(torch.device("cpu"))
    held = torch.ones(int((before + 50) * 1e6) // 4)
    assert peak_memory_mb(torch.device("cpu")) > before
    assert held.sum() > 0
