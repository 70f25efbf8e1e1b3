"""Kinds of reference: on disk, live, moving, none; with adapters and without."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_model, torchrun, weights, words
from test_adapters import adapted
from test_step import GROUPS

from mcpo.adapters import POLICY, REFERENCE, attach, read, save
from mcpo.cli import make_config
from mcpo.config import Config
from mcpo.engine.single import SingleEngine
from mcpo.metrics import read_metrics
from mcpo.optimizer import build_optimizer
from mcpo.pack import pack
from mcpo.policy import Policy
from mcpo.reference import (
    LiveReference,
    NoReference,
    ReferenceSync,
    keeps_adapter,
    live_reference,
    resolved_kind,
)
from mcpo.self_check import FLOAT32_UNITS
from mcpo.step import StepWork, train_step
from mcpo.train import main

BATCH = pack(GROUPS, share_prefix=True)
SYNC = {"sync_ref_model": "true", "ref_model_sync_steps": 3}


def trained(
    config: Config, model: Any, steps: int = 4
) -> tuple[Policy, LiveReference, list[dict[str, float]], list[torch.Tensor]]:
    """A policy after some steps, its reference, their metrics, and what the reference scored."""
    if config.adapter.adapts:
        attach(model, config.adapter, seed=0, keep_reference=keeps_adapter(config))
    policy = Policy(model, head_impl="auto", autocast_dtype=None, recompute="light").train()
    reference, sync = live_reference(policy, config)
    engine = SingleEngine(policy, build_optimizer(policy, config.optim), torch.device("cpu"))
    metrics, scored = [], [reference.of(BATCH)]
    for step in range(steps):
        work = StepWork(step=step, batches=(BATCH,), num_prompts=len(GROUPS))
        metrics.append(train_step(engine, work, reference, config))
        if sync:
            sync.after_step(step + 1)
        scored.append(reference.of(BATCH))
    return policy, reference, metrics, scored


def config_of(**options: Any) -> Config:
    return make_config({"learning_rate": 1e-2, "reference": "live", **options})


@pytest.fixture
def trained_adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    save(adapted(build_model(), "all-linear"), folder)
    return folder


def test_a_live_reference_stays_where_it_was(trained_adapter: Path) -> None:
    """A copy of the weights, the base under a fresh adapter, a frozen adapter beside a trained."""
    loaded = {"adapter_name_or_path": str(trained_adapter)}
    for options in ({}, {"use_peft": True}, loaded):
        policy, _, metrics, scored = trained(config_of(**options), build_model())
        assert all(torch.equal(scored[0], again) for again in scored)
        began, ended = metrics[0], metrics[-1]
        assert began["loss"] == pytest.approx(0.6931, abs=1e-4)
        assert ended["loss"] < began["loss"]
        assert not torch.equal(policy(BATCH)[BATCH.seq_of_PC[:, 0]], scored[0][:, 0])


def test_an_adapter_is_its_own_reference(trained_adapter: Path) -> None:
    """The base alone would be another policy than the one that training begins from."""
    config = config_of(adapter_name_or_path=str(trained_adapter))
    bare = LiveReference(policy=Policy(build_model(), head_impl="auto", autocast_dtype=None))
    policy, reference, _, scored = trained(config, build_model(), steps=1)
    assert (bare.of(BATCH) - scored[0]).abs().max() > 0.1
    names = [name for name, weight in policy.named_parameters() if weight.requires_grad]
    assert names
    assert all(f".{POLICY}." in name for name in names)
    tensors = read(policy.model, REFERENCE)
    assert not any(tensor.requires_grad for tensor in tensors.values())
    assert reference.policy is policy


def test_a_soft_update_mixes_and_a_hard_one_copies() -> None:
    generator = torch.Generator().manual_seed(0)
    policy, reference = (
        {name: torch.randn(5, 3, generator=generator) for name in "ab"} for _ in range(2)
    )
    before = {name: tensor.clone() for name, tensor in reference.items()}
    soft = ReferenceSync(policy=policy, reference=reference, alpha=0.6, steps=4)
    for step in (1, 2, 3, 5):
        soft.after_step(step)
    assert all(torch.equal(before[name], reference[name]) for name in "ab")
    soft.after_step(8)
    for name in "ab":
        mixed = 0.6 * policy[name].double() + 0.4 * before[name].double()
        # Three roundings of numbers below four.
        assert (reference[name] - mixed).abs().max() <= 3 * 4 * torch.finfo(torch.float32).eps
    ReferenceSync(policy=policy, reference=reference, alpha=1.0, steps=4).after_step(4)
    assert all(torch.equal(policy[name], reference[name]) for name in "ab")
    assert all(policy[name] is not reference[name] for name in "ab")


@pytest.mark.parametrize("options", [{}, {"use_peft": True}], ids=["whole", "adapter"])
def test_after_a_hard_update_the_loss_begins_anew(options: dict[str, Any]) -> None:
    config = config_of(
        **options, sync_ref_model=True, ref_model_mixup_alpha=1, ref_model_sync_steps=2
    )
    _, _, metrics, _ = trained(config, build_model(), steps=6)
    anew = [line["loss"] for line in metrics[0::2]]
    between = [line["loss"] for line in metrics[1::2]]
    # A log-ratio of equal forwards is 0 but for rounding, its reward a tenth of that.
    assert anew == pytest.approx([0.693147] * 3, abs=1e-5)
    assert max(between) < 0.69


@pytest.mark.parametrize("options", [{}, {"use_peft": "true"}], ids=["whole", "adapter"])
def test_a_moving_reference_resumes_bit_for_bit(
    arguments: dict[str, Any], tmp_path: Path, options: dict[str, Any]
) -> None:
    """From a checkpoint between two syncs: the reference is neither the start nor the policy."""
    alpha = {"ref_model_mixup_alpha": 1.0 if options else 0.6}
    moving = arguments | SYNC | alpha | options | {"save_steps": 4, "save_total_limit": 9}
    assert main(words(moving)) == 0
    resumed = tmp_path / "resumed"
    shutil.copytree(arguments["output_dir"] / "checkpoint-4", resumed / "checkpoint-4")
    assert main([*words(moving | {"output_dir": resumed}), "--resume"]) == 0
    whole = read_metrics(arguments["output_dir"] / "metrics.jsonl")
    again = read_metrics(resumed / "metrics.jsonl")
    timeless = ("loss", "grad_norm", "rewards/chosen", "logps/chosen")
    assert [[line[name] for name in timeless] for line in whole[4:]] == [
        [line[name] for name in timeless] for line in again
    ]
    assert "eval_rewards/accuracies" in again[-1]


def test_a_checkpoint_without_the_reference_is_refused() -> None:
    sync = ReferenceSync(
        policy={"a": torch.ones(1)}, reference={"a": torch.ones(1)}, alpha=1, steps=1
    )
    with pytest.raises(ValueError, match="must hold the weights of the reference that follows"):
        sync.load_state_dict({})


def test_resume_with_another_sync_is_refused(
    arguments: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    main(words(arguments | {"save_steps": 4, "max_steps": 4}))
    assert main([*words(arguments | SYNC | {"max_steps": 4}), "--resume"]) == 2
    error = capsys.readouterr().err
    assert "reference (precomputed then, live now); sync_ref_model (False then, True" in error


def test_live_and_precomputed_make_the_same_run(arguments: dict[str, Any], tmp_path: Path) -> None:
    """By gradient descent, which unlike Adam makes no full step of the rounding of a gradient."""
    descent = {"adam_epsilon": 1e6, "learning_rate": 1e5, "adam_beta1": 0, "max_grad_norm": "inf"}
    arguments |= descent
    main(words(arguments))
    live = arguments | {"reference": "live", "output_dir": tmp_path / "live"}
    main(words(live | {"reference_cache_dir": tmp_path / "unused"}))
    assert not (tmp_path / "unused").exists()
    first, second = weights(arguments["output_dir"]), weights(tmp_path / "live")
    start = build_model().state_dict()
    for name in first:
        moved = float((first[name] - start[name]).norm())
        # Packed otherwise, log-probabilities are rounded otherwise.
        allowed = FLOAT32_UNITS * torch.finfo(torch.float32).eps * float(first[name].norm())
        assert moved > 100 * allowed, name
        assert float((first[name] - second[name]).norm()) <= allowed, name


@pytest.mark.slow
def test_processes_keep_one_moving_reference(arguments: dict[str, Any], tmp_path: Path) -> None:
    """The losses after a hard update begin anew on both ranks alike."""
    options = {"per_device_train_batch_size": 2, "ref_model_mixup_alpha": 1.0}
    for number, more in enumerate(({}, {"use_peft": "true"})):
        folder = tmp_path / str(number)
        torchrun(arguments | SYNC | options | more | {"output_dir": folder}, 2)
        lines = read_metrics(folder / "metrics.jsonl")
        anew = [line["loss"] for line in lines[0::3]]
        assert anew == pytest.approx([0.693147] * 3, abs=1e-5)
        assert min(line["loss"] for line in lines) < 0.69


def test_kinds_are_resolved_by_need() -> None:
    free = {"score": "mean_logp", "reference": "auto", "loss_type": "simpo"}
    assert resolved_kind(make_config({})) == "precomputed"
    assert resolved_kind(make_config(free | {"loss_type": "mcpo"})) == "precomputed"
    assert resolved_kind(make_config(free | {"loss_type": ["simpo", "dpo"]})) == "precomputed"
    assert resolved_kind(make_config(free | {"scoring": "lazy"})) == "precomputed"
    assert resolved_kind(make_config({"sync_ref_model": True})) == "live"
    assert resolved_kind(make_config(free)) == "none"
    assert resolved_kind(make_config(free | {"reference": "none"})) == "none"
    assert resolved_kind(make_config(free | {"reference": "live"})) == "live"
    assert resolved_kind(make_config({})) == "precomputed"
    assert torch.equal(NoReference().of(BATCH), torch.zeros(BATCH.mask_PC.shape))


def test_a_run_without_reference(
    arguments: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    settings = arguments | {"score": "logp", "loss_type": "simpo", "max_steps": 2}
    assert main(words(settings)) == 0
    assert "reference: none, the loss and the score need none" in capsys.readouterr().out
    assert not arguments["reference_cache_dir"].exists()
    lines = read_metrics(arguments["output_dir"] / "metrics.jsonl")
    assert lines[0]["rewards/chosen"] == pytest.approx(0.1 * lines[0]["logps/chosen"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reference": "none"}, "got loss_type: mcpo and score: log_ratio; give reference: auto"),
        ({"reference": "none", "score": "logp"}, "score without a reference, got loss_type: mcpo;"),
        (
            {"reference": "live", "scoring": "lazy", "score": "logp"},
            "set reference: precomputed, or score: log_ratio",
        ),
        (SYNC | {"reference": "precomputed"}, "then must be live (reference: live or auto), got"),
        ({"ref_model_mixup_alpha": 0}, "ref_model_mixup_alpha must be in (0, 1], got 0.0"),
        ({"ref_model_sync_steps": 0}, "ref_model_sync_steps must be at least 1, got 0"),
    ],
)
def test_what_a_reference_cannot_be_is_refused(
    arguments: dict[str, Any],
    change: dict[str, Any],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(words(arguments | change)) == 2
    assert message in capsys.readouterr().err
