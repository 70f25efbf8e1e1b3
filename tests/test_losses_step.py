"""Losses inside a step: however it is cut or recomputed, the same update."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from scored_batches import CONFIGS, config_of
from test_step import groups_of
from tiny_models import SIZES, float64_model

from mcpo.cli import make_config
from mcpo.config import Config, KernelConfig, LossConfig
from mcpo.engine.single import SingleEngine
from mcpo.loop import Job, Segment, work_of
from mcpo.losses.baselines import RunningBaselines
from mcpo.mismatched import with_mismatched
from mcpo.pack import pack, split_by_budget
from mcpo.policy import Policy, group_logps, mismatched_logps
from mcpo.recompute import resolve_recompute
from mcpo.records import Baselines, PackedBatch, TokenizedGroup
from mcpo.reference_cache import ReferenceLogps
from mcpo.step import StepWork, train_step

VOCABULARY = SIZES["vocab_size"]


def rated_groups(count: int) -> tuple[TokenizedGroup, ...]:
    """Of the small vocabulary, with ratings and mismatched completions."""
    groups = [
        replace(
            group,
            prompt_ids=tuple(token % VOCABULARY for token in group.prompt_ids),
            candidate_ids=tuple(
                tuple(token % VOCABULARY for token in ids) for ids in group.candidate_ids
            ),
            scores=tuple(float(place % 3) for place in range(group.num_candidates)),
        )
        for group in groups_of(count)
    ]
    return with_mismatched(groups, max_length=None)


GROUPS = rated_groups(6)
BASELINES = Baselines(delta=0.2, z0=0.3)
# Every loss, every candidate a negative, and a sum of what is normalised in every way.
OBJECTIVES: dict[str, LossConfig] = {
    **{name: replace(config, beta=0.1) for name, config in CONFIGS.items()},
    "augmented dpo": config_of("dpo", augmented=True),
    "sum": LossConfig(
        loss_type=("mcpo", "kto", "infonca"), loss_weights=(0.5, 0.3, 2.0), sft_weight=0.7
    ),
}


def run_config(objective: str, **kernel: Any) -> Config:
    if objective == "rnce":
        kernel["strategy"] = "random"
    if objective != "mcpo_unbiased":
        kernel["num_negatives"] = 2
    base = make_config({"max_grad_norm": 1e9, "seed": 1})
    return replace(base, loss=OBJECTIVES[objective], kernel=KernelConfig(**kernel))


@pytest.fixture(scope="module")
def policy() -> Policy:
    return Policy(
        float64_model("llama"), head_impl="auto", autocast_dtype=None, recompute="selective"
    )


@pytest.fixture(scope="module")
def references(policy: Policy) -> ReferenceLogps:
    """Not the policy's own: every log-ratio is another."""
    batch = pack(GROUPS, share_prefix=True)
    with torch.no_grad():
        logp_S = policy(batch)
    logp_PC, last_P = group_logps(logp_S, batch), mismatched_logps(logp_S, batch)
    noise = torch.Generator().manual_seed(2)
    return ReferenceLogps(
        logps={
            group.row_id: tuple(
                (
                    torch.tensor([*row[: group.num_candidates], last])
                    + 4 * torch.randn(group.num_candidates + 1, generator=noise)
                ).tolist()
            )
            for group, row, last in zip(GROUPS, logp_PC.tolist(), last_P.tolist(), strict=True)
        }
    )


def packs(max_tokens: int) -> tuple[PackedBatch, ...]:
    return tuple(
        pack(some, share_prefix=True) for some in split_by_budget(GROUPS, max_tokens, True)
    )


def work(batches: tuple[PackedBatch, ...]) -> StepWork:
    return StepWork(
        step=0,
        batches=batches,
        num_prompts=len(GROUPS),
        chosen_tokens=sum(len(group.candidate_ids[0]) for group in GROUPS),
        baselines=BASELINES,
    )


def gradient_of(
    policy: Policy, works: list[StepWork], references: ReferenceLogps, config: Config, mode: str
) -> tuple[torch.Tensor, dict[str, float]]:
    """The summed gradient of the works, as ranks sum theirs, and the summed metrics."""
    policy.recompute = mode
    total, metrics = torch.zeros(()), dict[str, float]()
    for each in works:
        engine = SingleEngine(policy, torch.optim.SGD(policy.parameters(), 0), torch.device("cpu"))
        kept: list[torch.Tensor] = []
        engine.optimizer.register_step_pre_hook(lambda *_, kept=kept: kept.append(flat(policy)))
        found = train_step(engine, each, references, config)
        total = total + kept[0]
        metrics = {name: metrics.get(name, 0.0) + value for name, value in found.items()}
    return total, metrics


def flat(policy: Policy) -> torch.Tensor:
    return torch.cat([p.grad.flatten().clone() for p in policy.parameters() if p.grad is not None])


def assert_same(gradient: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.abs().max() > 0
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-9 * float(expected.abs().max()))


@pytest.mark.usefixtures("exact_softmax")
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_no_cut_and_no_recompute_changes_the_gradient(
    policy: Policy, references: ReferenceLogps, objective: str
) -> None:
    config = run_config(objective)
    expected, metrics = gradient_of(policy, [work(packs(10_000))], references, config, "none")
    cut, cut_metrics = gradient_of(policy, [work(packs(1))], references, config, "none")
    assert len(packs(1)) == len(GROUPS)
    assert_same(cut, expected)
    for name in ("loss", "rewards/margins", "grad_norm"):
        assert cut_metrics[name] == pytest.approx(metrics[name], rel=1e-9, abs=1e-12)
    recomputed, _ = gradient_of(policy, [work(packs(40))], references, config, "selective")
    assert_same(recomputed, expected)


def job_of(rank: int, world_size: int, per_device: int, steps: int) -> Job:
    config = make_config(
        {"per_device_train_batch_size": per_device, "gradient_accumulation_steps": steps}
    )
    engine = SimpleNamespace(rank=rank, world_size=world_size, device=torch.device("cpu"))
    running = RunningBaselines()
    running.load_state_dict({"delta": 0.2, "mismatched": 0.3})
    job = SimpleNamespace(
        config=config,
        engine=engine,
        train_groups=GROUPS,
        baselines=running,
        chains=None,
        segment=Segment(number=0, start=0, stop=1),
    )
    return cast("Job", job)


@pytest.mark.usefixtures("exact_softmax")
@pytest.mark.parametrize("objective", ["sft", "bco", "sum"])
@pytest.mark.parametrize(("world_size", "per_device", "steps"), [(2, 3, 1), (1, 2, 3), (4, 2, 1)])
def test_ranks_and_accumulation_share_one_gradient(
    policy: Policy,
    references: ReferenceLogps,
    objective: str,
    world_size: int,
    per_device: int,
    steps: int,
) -> None:
    """The gradient of a step is the sum over ranks of what ``work_of`` gives each of them."""
    config = run_config(objective)
    whole, _ = work_of(job_of(0, 1, 6, 1), 0)
    expected, _ = gradient_of(policy, [whole], references, config, "none")
    shares = [
        work_of(job_of(rank, world_size, per_device, steps), 0)[0] for rank in range(world_size)
    ]
    assert {(share.num_prompts, share.chosen_tokens) for share in shares} == {
        (6, whole.chosen_tokens)
    }
    got, _ = gradient_of(policy, shares, references, config, "none")
    assert_same(got, expected)


def test_a_mean_over_tokens_counts_every_token_alike(
    policy: Policy, references: ReferenceLogps
) -> None:
    """And not every prompt."""
    config = run_config("sft")
    _, metrics = gradient_of(policy, [work(packs(10_000))], references, config, "none")
    batch = pack(GROUPS, share_prefix=True)
    with torch.no_grad():
        chosen_P = group_logps(policy(batch), batch)[:, 0]
    expected = -float(chosen_P.sum()) / sum(len(group.candidate_ids[0]) for group in GROUPS)
    assert metrics["loss"] == pytest.approx(expected, rel=1e-6)


def test_terms_and_baselines_are_logged_where_they_are(
    policy: Policy, references: ReferenceLogps
) -> None:
    _, metrics = gradient_of(policy, [work(packs(40))], references, run_config("sum"), "none")
    weights = {"mcpo": 0.5, "kto": 0.3, "infonca": 2.0, "sft": 0.7}
    total = sum(weight * metrics[f"loss/{name}"] for name, weight in weights.items())
    assert metrics["loss"] == pytest.approx(total, rel=1e-6)
    assert metrics["kto/z0"] == pytest.approx(BASELINES.z0)
    batch = pack(GROUPS, share_prefix=True)
    with torch.no_grad():
        ratio_P = mismatched_logps(policy(batch), batch) - references.with_mismatched(batch)[1]
    assert metrics["kto/mismatched"] == pytest.approx(0.1 * float(ratio_P.mean()), rel=1e-5)
    assert "bco/delta" not in metrics
    _, metrics = gradient_of(policy, [work(packs(40))], references, run_config("bco"), "none")
    assert metrics["bco/delta"] == pytest.approx(BASELINES.delta)
    assert not [name for name in metrics if name.startswith("loss/")]


def test_running_means_begin_at_zero_and_take_in_whole_steps() -> None:
    running = RunningBaselines()
    assert running.values == Baselines(delta=0.0, z0=0.0)
    first = {"rewards/chosen": 2.0, "rewards/rejected": -1.0, "kto/mismatched": 4.0}
    running.update(first, decay=0.75)
    assert running.values == Baselines(delta=0.125, z0=1.0)
    running.update(first | {"kto/mismatched": -11.0}, decay=0.75)
    # The running mean is below 0, as no KL divergence is.
    assert running.values == Baselines(delta=0.21875, z0=0.0)
    other = RunningBaselines()
    other.load_state_dict(running.state_dict())
    for each in (running, other):
        each.update(first | {"kto/mismatched": 21.0}, decay=0.75)
    assert running.values == other.values
    assert running.values.z0 == 0.75 * -2.0 + 0.25 * 21.0
    running.update(first, decay=0.0)
    assert running.values == Baselines(delta=0.5, z0=4.0)


@pytest.mark.parametrize(
    ("objective", "mode"), [("mcpo", "light"), ("infonca", "none"), ("augmented dpo", "none")]
)
def test_recompute_knows_how_many_candidates_have_a_gradient(
    policy: Policy, objective: str, mode: str
) -> None:
    """Where all have one, there is nothing to be saved by running again what some have."""
    # Long enough that the prompts do not matter.
    wide = [
        replace(
            group,
            candidate_ids=tuple(ids * 9 for ids in group.candidate_ids),
            mismatched_ids=None,
        )
        for group in GROUPS
        if group.num_candidates > 3
    ]
    config = replace(run_config(objective), kernel=KernelConfig())
    assert resolve_recompute(config, wide, policy.model, 2**40).mode == mode
