"""Whole runs of the tiny model, as a user starts them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    ROOT,
    build_model,
    build_tokenizer,
    candidate_lines,
    torchrun,
    weights,
    words,
    write_jsonl,
)

from mcpo import run
from mcpo.evaluate import generate
from mcpo.metrics import read_metrics
from mcpo.reference_cache import read
from mcpo.self_check import FLOAT32_UNITS, float32_band
from mcpo.train import main


def test_a_run_learns_and_leaves_its_results(arguments: dict[str, Any]) -> None:
    assert main(words(arguments)) == 0
    output_dir = arguments["output_dir"]
    summary = json.loads((output_dir / "summary.json").read_text())
    for key in ("preference_accuracy", "wall_s", "tokens_per_s", "peak_memory_mb"):
        assert summary[key] > 0
    assert summary["steps"] == 8
    assert (output_dir / "curves.png").stat().st_size > 1000
    lines = read_metrics(output_dir / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert lines[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[-1]["epoch"] == 2.0
    assert {"tokens_per_second", "peak_memory_mb", "eval_rewards/accuracies"} <= set(lines[-1])


def test_a_run_repeats_bit_for_bit(arguments: dict[str, Any], tmp_path: Path) -> None:
    main(words(arguments))
    main(words(arguments | {"output_dir": tmp_path / "again"}))
    first, second = weights(arguments["output_dir"]), weights(tmp_path / "again")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_every_evaluation_is_logged(arguments: dict[str, Any]) -> None:
    main(words(arguments | {"logging_steps": 3, "eval_steps": 2, "max_steps": 7}))
    lines = read_metrics(arguments["output_dir"] / "metrics.jsonl")
    assert [line["step"] for line in lines] == [2, 3, 4, 6, 7]
    assert [line["step"] for line in lines if "eval_loss" in line] == [2, 4, 6, 7]


def test_a_tracker_is_sent_the_lines_of_the_file(
    arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[tuple[dict[str, float], int]] = []
    monkeypatch.setattr(run, "tracker", lambda *_: lambda line, step: sent.append((line, step)))
    main(words(arguments | {"max_steps": 3}))
    lines = read_metrics(arguments["output_dir"] / "metrics.jsonl")
    assert sent == [(line, line["step"]) for line in lines]
    assert lines[2]["num_tokens"] > lines[1]["num_tokens"] > lines[0]["num_tokens"]


# A mean over tokens, and one over earlier steps.
KTO = {"loss_type": "kto", "sft_weight": 0.3, "num_negatives": 2}


@pytest.mark.parametrize(
    ("num_groups", "engine", "objective"),
    [
        (15, "ddp", {}),
        (13, "ddp", KTO),
        (13, "fsdp2", {}),
        pytest.param(15, "fsdp2", KTO, marks=pytest.mark.slow),
    ],
    ids=["uneven-shares", "a-rank-without-rows", "fsdp2-a-rank-without-rows", "fsdp2-uneven"],
)
def test_two_processes_make_the_update_of_one(
    arguments: dict[str, Any],
    tmp_path: Path,
    num_groups: int,
    engine: str,
    objective: dict[str, Any],
) -> None:
    """Steps of 4, the last of an epoch of 3 or 1; ranks differ in micro-batches.

    With a large epsilon, no momentum and no clipping AdamW is gradient descent, here at a rate of
    0.1, which neither hides a wrong factor, as a sign-like step would, nor makes a full step of the
    rounding of a gradient near 0.
    """
    data = write_jsonl(tmp_path / "train.jsonl", candidate_lines(num_groups, seed=0))
    descent = {"train_data": data, "adam_epsilon": 1e6, "learning_rate": 1e5, "adam_beta1": 0}
    descent |= {"max_grad_norm": "inf", "lr_scheduler_type": "constant", "warmup_ratio": 0}
    one = arguments | descent | objective | {"per_device_train_batch_size": 4}
    two = one | {"per_device_train_batch_size": 2, "output_dir": tmp_path / "two"}
    main(words(one))
    torchrun(two | {"launch": engine}, 2)
    expected = read_metrics(one["output_dir"] / "metrics.jsonl")
    got = read_metrics(two["output_dir"] / "metrics.jsonl")
    start = build_model().state_dict()
    first, second = weights(one["output_dir"]), weights(two["output_dir"])
    eps = torch.finfo(torch.float32).eps
    for name in first:
        moved = float((first[name] - start[name]).norm())
        # In a step either run rounds a weight once, by half a unit in its last place at most: they
        # part by a unit. Beside that gradients differ by their rounding, and what they moved with
        # them; the way is short, so neither grows on it.
        allowed = eps * (len(got) * float(first[name].norm()) + FLOAT32_UNITS * moved)
        # Else a wrong factor in one of the steps might not show.
        assert moved > 1000 * allowed, name
        assert float((first[name] - second[name]).norm()) <= allowed, name
    # A log-prob is off by its band, a reward by beta times that, a margin or a loss by two rewards;
    # a gradient, whose factor is the softmax of rewards, by as much of itself.
    (cache,) = arguments["reference_cache_dir"].iterdir()
    logp = torch.tensor([logp for logps in read(cache).values() for logp in logps])
    band = 2 * 0.1 * float(float32_band(logp.abs().max(), torch.tensor(10)))
    for mine, theirs in zip(got, expected, strict=True):
        assert mine["num_tokens"] == theirs["num_tokens"]
        # Not mc/drawn_rank and accuracies, which turn where scores tie but for rounding.
        assert set(mine) == set(theirs)
        shown = {"loss", "grad_norm", "rewards/margins", "eval_loss", "eval_rewards/margins"}
        for name in shown & set(mine):
            assert mine[name] == pytest.approx(theirs[name], rel=band, abs=band), name


def test_held_out_prompts_are_answered_before_and_after(
    arguments: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    items = [
        {
            "id": f"item-{number}",
            "prompt": f"w{number} w2",
            "topic": f"topic {number // 2}",
            "checks": [{"kind": "no_commas", "args": {}}, {"kind": "has_number", "args": {}}],
            "unseen_kind": False,
        }
        for number in range(6)
    ]
    held = write_jsonl(tmp_path / "prompts.jsonl", items)
    settings = {"heldout_prompts": held, "heldout_max_new_tokens": 5, "heldout_batch_size": 4}
    assert main(words(arguments | settings | {"max_steps": 1})) == 0
    summary = json.loads((arguments["output_dir"] / "summary.json").read_text())
    assert summary["heldout_n"] == 12
    for key in ("heldout_pass_before", "heldout_pass_after", "heldout_p_value"):
        assert 0 <= summary[key] <= 1
    for name in ("before", "after"):
        answers = (arguments["output_dir"] / f"heldout_{name}.jsonl").read_text().splitlines()
        assert [json.loads(line)["id"] for line in answers] == [item["id"] for item in items]
    shown = capsys.readouterr().out
    assert "held-out checks passed, before" in shown
    assert "p-value, paired" in shown


@pytest.mark.parametrize("prompt_format", ["chat", "plain"])
def test_held_out_prompts_are_put_as_training_puts_them(
    arguments: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    prompt_format: str,
) -> None:
    checks = [{"kind": "no_commas", "args": {}}]
    item = {"id": "a", "prompt": "w8 w9", "topic": "t", "checks": checks, "unseen_kind": False}
    read: list[list[list[int]]] = []
    original = generate.generate_batch

    def note(model: Any, encoder: Any, prompt_ids: Any, *rest: Any, **options: Any) -> Any:
        read.append([list(ids) for ids in prompt_ids])
        return original(model, encoder, prompt_ids, *rest, **options)

    monkeypatch.setattr(generate, "generate_batch", note)
    settings = {
        "heldout_prompts": write_jsonl(tmp_path / "prompts.jsonl", [item]),
        "heldout_max_new_tokens": 1,
        "prompt_format": prompt_format,
        "max_steps": 1,
    }
    assert main(words(arguments | settings)) == 0
    around = ("<|im_start|> user", "<|im_end|> <|im_start|> assistant")
    text = " ".join((around[0], "w8 w9", around[1])) if prompt_format == "chat" else "w8 w9"
    expected = build_tokenizer().convert_tokens_to_ids(text.split())
    assert read == [[expected], [expected]]


def test_dry_run_trains_nothing(
    arguments: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words(arguments), "--dry_run"]) == 0
    shown = capsys.readouterr().out
    for part in ("14 groups", "dry run: nothing was trained", "steps", "optimizer", "MB"):
        assert part in shown
    assert not arguments["output_dir"].exists()


def test_dry_run_knows_a_model_that_cannot_be_packed(
    arguments: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without shared prompts, and with what recompute means then."""
    monkeypatch.setenv("COLUMNS", "200")
    reason = "it has layers of the kind linear_attention"
    monkeypatch.setattr("mcpo.dry_run.declared_refusal", lambda model: reason)
    assert main([*words(arguments), "--dry_run", "--recompute", "light"]) == 0
    lines = [line.split("│") for line in capsys.readouterr().out.splitlines() if "│" in line]
    shown = {line[1].strip(): line[2].strip() for line in lines}
    assert shown["batches"] == f"one sequence per row: {reason}"
    assert shown["of which a shared prompt saves"] == "0%"
    assert shown["recompute"] == "full"
    assert main([*words(arguments), "--dry_run", "--prefix_sharing", "on"]) == 2
    assert f"needs a model that can be packed: {reason}" in capsys.readouterr().err


def test_dry_run_counts_the_processes_of_the_job(
    arguments: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert main([*words(arguments), "--dry_run"]) == 0
    assert "14, 12" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_name_or_path": str(ROOT / "docs")}, "model_name_or_path must be"),
        ({"train_data": "absent.jsonl"}, "there is no file absent.jsonl"),
        ({"loss_type": "dpoo"}, "loss_type must be one of mcpo, mcpo_unbiased, rnce, dpo"),
        ({"device": "tpu9"}, "device must be auto, cpu"),
        ({"device": "meta"}, "device must be auto, cpu"),
        ({"reference_cache_dir": str(ROOT / "README.md")}, "README.md"),
        ({"output_dir": str(ROOT / "README.md" / "run")}, "README.md"),
        ({"num_train_epochs": "inf"}, "num_train_epochs must be positive and finite, got inf"),
        ({"weight_decay": -1}, "weight_decay must be 0 or more, got -1.0"),
        ({"seed": 2**64}, "seed must be from 0 to 2**63 - 1"),
        ({"head_impl": "triton"}, "head_impl: impl='triton' cannot run here"),
        ({"head_impl": "fast"}, "impl must be one of"),
        ({"output_dir": str(ROOT / "README.md")}, "output_dir must be a folder"),
        ({"seed": -1}, "seed must be from 0 to 2**63 - 1, got -1"),
        ({"heldout_batch_size": 0}, "heldout_batch_size must be at least 1, got 0"),
        ({"adam_beta2": 1}, "adam_beta2 must be in [0, 1), got 1.0"),
        ({"heldout_prompts": "absent.jsonl"}, "absent.jsonl"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_input_is_one_clear_line(
    arguments: dict[str, Any],
    change: dict[str, Any],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(words(arguments | change)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error


def test_no_training_data_is_named(
    arguments: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    del arguments["train_data"]
    assert main(words(arguments)) == 2
    assert "train_data must name at least one file" in capsys.readouterr().err


def test_rows_cannot_be_trained_on_and_held_out(
    arguments: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    same = arguments | {"eval_data": arguments["train_data"]}
    assert main(words(same)) == 2
    assert "got the same ids in train_data and eval_data: ['row-0'" in capsys.readouterr().err


def test_a_cache_of_other_weights_is_caught(
    arguments: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """The cache's key and hashes would have to fail first; the self-check is the last guard."""
    main(words(arguments))
    (folder,) = arguments["reference_cache_dir"].iterdir()
    (path,) = folder.iterdir()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row["logps"] = [logp - 3.0 for logp in row["logps"]]
    write_jsonl(path, rows)
    assert main([*words(arguments), "--overwrite_output_dir"]) == 2
    assert "before the first step every log-ratio to the reference must be 0" in (
        capsys.readouterr().err
    )


def test_max_steps_and_every_strategy_run(arguments: dict[str, Any], tmp_path: Path) -> None:
    for number, strategy in enumerate(("mc", "max", "min", "random")):
        changed = arguments | {
            "strategy": strategy,
            "num_negatives": 2,
            "max_steps": 1,
            "output_dir": tmp_path / str(number),
        }
        assert main(words(changed)) == 0
        (line,) = read_metrics(changed["output_dir"] / "metrics.jsonl")
        assert line["loss"] > 0.6931
