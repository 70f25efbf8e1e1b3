"""Whole runs with lazy scoring, and with negatives that are drawn once."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import torchrun, weights, words

from mcpo import loop
from mcpo.checkpoint import load_training
from mcpo.metrics import read_metrics
from mcpo.step import StepWork
from mcpo.train import main


@pytest.fixture
def lazy_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    return arguments | {"scoring": "lazy", "lazy_audit_steps": 3, "num_train_epochs": 3}


def test_a_lazy_run_packs_less_learns_and_resumes_bit_for_bit(
    lazy_arguments: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed: list[StepWork] = []
    original = loop.train_step

    def note(engine: Any, work: StepWork, *rest: Any) -> dict[str, float]:
        packed.append(work)
        return original(engine, work, *rest)

    monkeypatch.setattr(loop, "train_step", note)
    whole = lazy_arguments | {"save_steps": 5, "save_total_limit": 9}
    assert main(words(whole)) == 0
    lines = read_metrics(whole["output_dir"] / "metrics.jsonl")
    assert len(lines) == 12
    assert lines[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert lines[-1]["loss"] < lines[0]["loss"]
    audited = [line["step"] for line in lines if "mc/lazy_tv" in line]
    assert audited == [3, 6, 9, 12]
    assert audited == [line["step"] for line in lines if "mc/stale_tv" in line]
    assert all({"mc/staleness", "mc/drift", "mc/acceptance"} <= set(line) for line in lines)
    columns = [each for work in packed for batch in work.batches for each in batch.columns]
    assert {len(each) for each in columns} == {2, 3}
    assert len({each[1:] for each in columns}) > 3

    resumed = whole | {"output_dir": tmp_path / "resumed"}
    shutil.copytree(whole["output_dir"] / "checkpoint-5", resumed["output_dir"] / "checkpoint-5")
    assert main([*words(resumed), "--resume"]) == 0
    first, second = weights(whole["output_dir"]), weights(resumed["output_dir"])
    assert all(torch.equal(first[name], second[name]) for name in first)
    chains = [
        load_training(each["output_dir"] / "checkpoint-10")["chains"] for each in (whole, resumed)
    ]
    assert all(torch.equal(chains[0][name], chains[1][name]) for name in ("known", "seen", "state"))


@pytest.mark.slow
def test_two_processes_resume_a_lazy_run_bit_for_bit(
    lazy_arguments: dict[str, Any], tmp_path: Path
) -> None:
    """In the second and third epoch prompts are met by other ranks than in the first."""
    two = lazy_arguments | {"per_device_train_batch_size": 2, "save_steps": 4}
    two |= {"save_total_limit": 9}
    torchrun(two, 2)
    copied = two | {"output_dir": tmp_path / "copied", "resume": "true"}
    shutil.copytree(two["output_dir"] / "checkpoint-4", copied["output_dir"] / "checkpoint-4")
    torchrun(copied, 2)
    first, second = weights(two["output_dir"]), weights(copied["output_dir"])
    assert all(torch.equal(first[name], second[name]) for name in first)
    # One process makes the same moves: scores differ by rounding alone, and no draw hangs on it.
    one = two | {"per_device_train_batch_size": 4, "output_dir": tmp_path / "one"}
    assert main(words(one)) == 0
    alone, shared = (
        load_training(each["output_dir"] / "checkpoint-4")["chains"] for each in (one, two)
    )
    assert torch.equal(alone["state"], shared["state"])
    assert torch.equal(alone["seen"], shared["seen"])
    torch.testing.assert_close(alone["known"], shared["known"], rtol=1e-3, atol=1e-4)


def test_static_negatives_are_packed_alone_in_every_step(
    arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: dict[str, set[tuple[int, ...]]] = {}
    original = loop.train_step

    def note(engine: Any, work: StepWork, *rest: Any) -> dict[str, float]:
        for batch in work.batches:
            assert batch.mask_PC.shape[1] == 2
            for prompt, row_id in enumerate(batch.row_ids):
                own = batch.seq_of_N == batch.seq_of_PC[prompt, 1]
                seen.setdefault(row_id, set()).add(tuple(batch.target_N[own].tolist()))
        return original(engine, work, *rest)

    monkeypatch.setattr(loop, "train_step", note)
    static = arguments | {"sampling": "static", "strategy": "random"}
    assert main(words(static)) == 0
    assert len(seen) == 14
    assert {len(each) for each in seen.values()} == {1}
    assert "sampling: static: 14 of " in capsys.readouterr().out
