"""Runs that stop and go on, and what they may find in their folder."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, build_model, build_tokenizer, torchrun, weights, words

from mcpo.engine.single import SingleEngine
from mcpo.metrics import read_metrics
from mcpo.train import main


def test_resume_gives_the_bits_of_an_undisturbed_run(
    arguments: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stopped by SIGTERM in the middle of the second epoch, then resumed."""
    main(words(arguments))
    stopped = arguments | {"output_dir": tmp_path / "stopped"}
    from mcpo import loop

    steps = 0
    original = loop.train_step

    def step_then_signal(*args: Any) -> dict[str, float]:
        nonlocal steps
        steps += 1
        if steps == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", step_then_signal)
        assert main(words(stopped)) == 0
    assert "interrupted after step 5 of 8" in capsys.readouterr().out
    assert not (stopped["output_dir"] / "model").exists()

    assert main(words(stopped)) == 2
    error = capsys.readouterr().err
    assert "output_dir must not hold another run" in error
    assert "checkpoint-5 is there; give --resume to continue that run" in error

    assert main([*words(stopped), "--resume"]) == 0
    assert "resumed from" in capsys.readouterr().out
    undisturbed, resumed = weights(arguments["output_dir"]), weights(stopped["output_dir"])
    assert all(torch.equal(undisturbed[name], resumed[name]) for name in undisturbed)
    losses = [
        [line["loss"] for line in read_metrics(folder / "metrics.jsonl")]
        for folder in (arguments["output_dir"], stopped["output_dir"])
    ]
    assert losses[0] == losses[1]


def test_resume_with_another_objective_is_refused(
    arguments: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    main(words(arguments | {"save_steps": 4}))
    changed = arguments | {"beta": 0.5, "learning_rate": 2e-3}
    assert main([*words(changed), "--resume"]) == 2
    error = capsys.readouterr().err
    assert "a run resumes as it began" in error
    assert "beta (0.1 then, 0.5 now); learning_rate (0.001 then, 0.002 now)" in error


def test_resume_knows_the_model_by_its_weights(
    arguments: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same folder with other weights is another model, another folder with the same is not."""
    folder = tmp_path / "model"
    build_model().save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    # Cutting the work differently is no reason to refuse either.
    main(words(arguments | {"save_steps": 4}))
    moved = arguments | {"model_name_or_path": folder, "max_tokens_per_micro_batch": 40}
    assert main([*words(moved), "--resume"]) == 0
    build_model(seed=1).save_pretrained(folder)
    assert main([*words(moved), "--resume"]) == 2
    assert "differs in: reference weights" in capsys.readouterr().err


@pytest.mark.parametrize("died_early", [False, True], ids=["first-start", "died-early"])
def test_resume_without_a_checkpoint_starts_and_says_so(
    arguments: dict[str, Any], capsys: pytest.CaptureFixture[str], died_early: bool
) -> None:
    """A launcher repeats its command: after nothing, or after a life without a checkpoint."""
    if died_early:
        arguments["output_dir"].mkdir()
        (arguments["output_dir"] / "metrics.jsonl").write_text('{"step": 1, "loss": 9.0}\n{"st')
        (arguments["output_dir"] / ".checkpoint-2.tmp").mkdir()
    assert main([*words(arguments), "--resume"]) == 0
    shown = capsys.readouterr().out
    assert shown.count(f"no checkpoint in {arguments['output_dir']}: starting from the") == 1
    lines = read_metrics(arguments["output_dir"] / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert lines[0]["loss"] < 1


def test_resume_never_replaces_a_finished_run(
    arguments: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    main(words(arguments))
    before = weights(arguments["output_dir"])
    assert main([*words(arguments), "--resume"]) == 2
    assert "has no checkpoint and the model of a finished run" in capsys.readouterr().err
    after = weights(arguments["output_dir"])
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert main([*words(arguments), "--resume", "--overwrite_output_dir"]) == 0
    assert "starting from the beginning" in capsys.readouterr().out


@pytest.mark.parametrize("content", [None, "{broken", '{"step": 4}', "[]"])
def test_a_checkpoint_that_cannot_be_read_is_never_passed_over(
    arguments: dict[str, Any], capsys: pytest.CaptureFixture[str], content: str | None
) -> None:
    folder = arguments["output_dir"] / "checkpoint-4"
    folder.mkdir(parents=True)
    if content is not None:
        (folder / "state.json").write_text(content)
    assert main([*words(arguments), "--resume"]) == 2
    assert "checkpoint-4 must be a whole checkpoint to resume from" in capsys.readouterr().err


def test_processes_that_see_different_checkpoints_are_told_so(
    arguments: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where each machine has an output folder of its own, which only the first writes to."""

    def gather(self: SingleEngine, value: object) -> list[object]:
        # The other process differs in its checkpoint, and in nothing else that they compare.
        return ["checkpoint-4", value] if value == "none" else [value, value]

    monkeypatch.setattr(SingleEngine, "gather", gather)
    assert main([*words(arguments), "--resume"]) == 2
    assert "they see, by rank, checkpoint-4, none; put output_dir on" in capsys.readouterr().err


# Ends the second process without a word in the third step of the job's first life.
MORTAL = """
import os, sys
from mcpo import loop
from mcpo.train import main

original = loop.train_step

def step(engine, work, *rest):
    first_life = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if first_life and os.environ["RANK"] == "1" and work.step == 2:
        os._exit(1)
    return original(engine, work, *rest)

loop.train_step = step
sys.exit(main())
"""


@pytest.mark.slow
@pytest.mark.parametrize("save_steps", [2, 0], ids=["with-checkpoint", "without"])
def test_a_job_that_the_launcher_restarts_ends_like_any_other(
    arguments: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save_steps: int
) -> None:
    """The same command from the first start on, ``--resume`` included."""
    # Else torchrun's second life finds the addresses of the first in a store that outlives it.
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    two = arguments | {"max_steps": 4, "per_device_train_batch_size": 2, "resume": "true"}
    script = tmp_path / "mortal.py"
    script.write_text(MORTAL)
    mortal = two | {"save_steps": save_steps, "output_dir": tmp_path / "mortal"}
    torchrun(mortal, 2, launcher="--max-restarts 1 --monitor-interval 0.1", job=str(script))
    torchrun(two, 2)
    first, second = weights(two["output_dir"]), weights(mortal["output_dir"])
    assert all(torch.equal(first[name], second[name]) for name in first)
    summary = json.loads((mortal["output_dir"] / "summary.json").read_text())
    assert summary["steps"] == 4


def test_results_are_replaced_only_when_told_to(
    arguments: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    main(words(arguments))
    before = weights(arguments["output_dir"])
    changed = arguments | {"learning_rate": 2e-3}
    assert main(words(changed)) == 2
    assert "model is there; give --overwrite_output_dir" in capsys.readouterr().err
    # Told to, but with an option that cannot be served: nothing is lost.
    for bad in ({"lr_scheduler_type": "sawtooth"}, {"model_name_or_path": str(ROOT / "docs")}):
        assert main([*words(changed | bad), "--overwrite_output_dir"]) == 2
    after = weights(arguments["output_dir"])
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert main([*words(changed), "--overwrite_output_dir"]) == 0
    replaced = weights(arguments["output_dir"])
    assert not all(torch.equal(before[name], replaced[name]) for name in before)


@pytest.mark.parametrize("engine", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_two_processes_resume_bit_for_bit(
    arguments: dict[str, Any], tmp_path: Path, engine: str
) -> None:
    """The second epoch again, from the checkpoint of the first, in a copy of the folder."""
    two = arguments | {"per_device_train_batch_size": 2, "save_steps": 4, "save_total_limit": 5}
    two |= {"launch": engine}
    torchrun(two, 2)
    copied = tmp_path / "copied"
    shutil.copytree(two["output_dir"] / "checkpoint-4", copied / "checkpoint-4")
    torchrun(two | {"output_dir": copied, "resume": "true"}, 2)
    first, second = weights(two["output_dir"]), weights(copied)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_a_sharded_run_resumes_on_another_number_of_processes(
    arguments: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With as many groups to a step: the same rows and draws, and sums in another order."""
    two = arguments | {"launch": "fsdp2", "save_steps": 4, "save_total_limit": 5}
    torchrun(two | {"per_device_train_batch_size": 2}, 2)
    copied = tmp_path / "copied"
    shutil.copytree(two["output_dir"] / "checkpoint-4", copied / "checkpoint-4")
    one = two | {"output_dir": copied, "resume": "true"}
    torchrun(one | {"per_device_train_batch_size": 4}, 1)
    first, second = weights(two["output_dir"]), weights(copied)
    start = build_model().state_dict()
    for name in first:
        # Four steps of AdamW at a rate of 1e-3, of which a gradient near 0 may turn the sign.
        moved = (first[name] - start[name]).norm()
        assert (first[name] - second[name]).norm() < 0.01 * moved, name
    # An engine that holds whole weights says that it cannot read shards.
    assert main([*words(arguments | {"output_dir": copied}), "--resume"]) == 2
    assert "a sharded engine wrote it; resume with that engine" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["training.pt", "optimizer.pt"])
def test_a_checkpoint_that_is_cut_off_is_named(
    arguments: dict[str, Any], capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert main(words(arguments | {"max_steps": 2, "save_steps": 1})) == 0
    path = arguments["output_dir"] / "checkpoint-2" / name
    path.write_bytes(path.read_bytes()[:100])
    shutil.rmtree(arguments["output_dir"] / "model")
    (arguments["output_dir"] / "summary.json").unlink()
    assert main([*words(arguments | {"max_steps": 2, "save_steps": 1}), "--resume"]) == 2
    error = capsys.readouterr().err
    assert f"its {name} cannot be read" in error
    assert "delete that folder to continue from the checkpoint before it" in error
