from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from conftest import build_model

from mcpo.cli import make_config
from mcpo.config import Config
from mcpo.engine.single import SingleEngine
from mcpo.optimizer import build_optimizer, build_schedule
from mcpo.pack import pack, split_by_budget
from mcpo.policy import Policy, group_logps
from mcpo.records import TokenizedGroup
from mcpo.reference_cache import ReferenceLogps
from mcpo.step import NonFiniteError, StepWork, train_step


def groups_of(count: int) -> list[TokenizedGroup]:
    draw = random.Random(3)

    def ids(least: int, most: int) -> tuple[int, ...]:
        return tuple(draw.choices(range(7, 97), k=draw.randint(least, most)))

    return [
        TokenizedGroup(
            row_id=f"r{number}",
            prompt_ids=(2, *ids(1, 5)),
            candidate_ids=tuple((*ids(1, 6), 3) for _ in range(draw.randint(2, 5))),
        )
        for number in range(count)
    ]


GROUPS = groups_of(6)
CONFIG = make_config(
    {"learning_rate": 1e-2, "max_grad_norm": 1e9, "weight_decay": 0.1, "warmup_ratio": 0.0}
)


def engine_of(dtype: torch.dtype = torch.float64) -> SingleEngine:
    policy = Policy(build_model().to(dtype).train(), head_impl="auto", autocast_dtype=None)
    return SingleEngine(policy, build_optimizer(policy, CONFIG.optim), torch.device("cpu"))


def references_of(engine: SingleEngine) -> ReferenceLogps:
    batch = pack(GROUPS, share_prefix=True)
    with torch.no_grad():
        logp_PC = group_logps(engine.policy(batch), batch)
    return ReferenceLogps(
        logps={
            group.row_id: tuple(row[: group.num_candidates])
            for group, row in zip(GROUPS, logp_PC.tolist(), strict=True)
        }
    )


def run_step(
    engine: SingleEngine, max_tokens: int, config: Config = CONFIG, *, share: bool = True
) -> dict[str, float]:
    batches = [
        pack(some, share_prefix=share) for some in split_by_budget(GROUPS, max_tokens, share)
    ]
    work = StepWork(step=0, batches=tuple(batches), num_prompts=len(GROUPS))
    return train_step(engine, work, references_of(engine_of()), config)


def weights(engine: SingleEngine) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in engine.policy.parameters()])


@pytest.mark.parametrize("max_tokens", [1, 40], ids=["one-group-each", "some"])
def test_cutting_a_step_into_micro_batches_changes_nothing(max_tokens: int) -> None:
    whole, cut = engine_of(), engine_of()
    expected = run_step(whole, 10_000)
    got = run_step(cut, max_tokens)
    # The norms of Llama compute in float32, and AdamW's first step is the sign of the gradient, so
    # what is compared is the metrics and the gradient norm, which carry no such amplification.
    assert got == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_update_of_a_cut_step_is_the_same() -> None:
    """With plain gradient descent the update is linear in the gradient and can be compared."""
    engines = engine_of(), engine_of()
    for engine, max_tokens in zip(engines, (10_000, 1), strict=True):
        engine.optimizer = torch.optim.SGD(engine.policy.parameters(), lr=0.1)
        run_step(engine, max_tokens)
    moved = (weights(engines[0]) - weights(engine_of())).abs().max()
    assert moved > 1e-4
    torch.testing.assert_close(
        weights(engines[0]), weights(engines[1]), rtol=0, atol=float(moved) * 1e-4
    )


def test_sharing_the_prompt_changes_nothing() -> None:
    shared = run_step(engine_of(), 10_000)
    separate = run_step(engine_of(), 10_000, share=False)
    assert separate.pop("num_tokens") > shared.pop("num_tokens")
    assert separate == pytest.approx(shared, rel=1e-5, abs=1e-6)


def test_metrics_have_trl_names_and_start_values() -> None:
    metrics = run_step(engine_of(), 10_000)
    assert metrics["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert metrics["rewards/margins"] == pytest.approx(0.0, abs=1e-4)
    assert metrics["logps/chosen"] < 0
    assert 1 <= metrics["mc/drawn_rank"] <= 4
    assert 1 <= metrics["mc/ess"] <= 4
    assert metrics["learning_rate"] == 1e-2
    assert {
        "grad_norm",
        "rewards/chosen",
        "rewards/rejected",
        "rewards/accuracies",
        "logps/rejected",
        "num_tokens",
    } <= set(metrics)


def test_chains_cost_no_forward_and_report_what_they_did() -> None:
    plain = run_step(engine_of(), 10_000)
    assert "mc/acceptance" not in plain
    options = {"chain": "subset", "chain_steps": 5, "num_negatives": 2, "replacement": True}
    config = make_config(
        {"learning_rate": 1e-2, "max_grad_norm": 1e9, "warmup_ratio": 0.0} | options
    )
    metrics = run_step(engine_of(), 10_000, config)
    assert 0 < metrics["mc/acceptance"] < 1
    assert metrics["num_tokens"] == plain["num_tokens"]
    assert 0 <= metrics["mc/entropy"] <= 1.4


def test_steps_lower_the_loss() -> None:
    engine = engine_of(torch.float32)
    references = references_of(engine)
    losses = []
    for step in range(12):
        work = StepWork(step=step, batches=(pack(GROUPS, share_prefix=True),), num_prompts=6)
        losses.append(train_step(engine, work, references, CONFIG)["loss"])
    assert losses[-1] < 0.5 * losses[0]


def test_weight_zero_leaves_gradient_and_metrics_alone() -> None:
    """A rank without prompts runs along with weight 0."""
    engine = engine_of()
    before = weights(engine)
    engine.optimizer = torch.optim.SGD(engine.policy.parameters(), lr=0.1)
    work = StepWork(
        step=0, batches=(pack(GROUPS[:1], share_prefix=True),), num_prompts=6, weight=0.0
    )
    metrics = train_step(engine, work, references_of(engine_of()), CONFIG)
    assert torch.equal(before, weights(engine))
    assert metrics["loss"] == 0.0
    assert metrics["num_tokens"] == 0.0


def test_non_finite_loss_names_the_rows_and_keeps_the_weights() -> None:
    engine = engine_of()
    before = weights(engine)
    references = references_of(engine)
    broken = ReferenceLogps(logps={**references.logps, "r2": (float("nan"),) * 5})
    work = StepWork(step=4, batches=(pack(GROUPS, share_prefix=True),), num_prompts=6)
    broken = ReferenceLogps(
        logps={**broken.logps, "r2": broken.logps["r2"][: GROUPS[2].num_candidates]}
    )
    with pytest.raises(NonFiniteError, match=r"step 4: the loss of rows \['r2'\] is not finite"):
        train_step(engine, work, broken, CONFIG)
    assert torch.equal(before, weights(engine))


def test_non_finite_gradient_names_this_ranks_rows() -> None:
    engine = engine_of()
    parameter = next(engine.policy.parameters())
    parameter.register_hook(lambda gradient: gradient * float("inf"))
    work = StepWork(step=1, batches=(pack(GROUPS[:2], share_prefix=True),), num_prompts=2)
    with pytest.raises(NonFiniteError, match=r"gradient is not finite.*\['r0', 'r1'\]"):
        train_step(engine, work, references_of(engine), CONFIG)


def test_matrices_decay_and_vectors_do_not() -> None:
    decayed, kept = build_optimizer(engine_of().policy, CONFIG.optim).param_groups
    assert decayed["weight_decay"] == 0.1
    assert kept["weight_decay"] == 0.0
    assert {parameter.dim() for parameter in kept["params"]} == {1}
    assert {parameter.dim() for parameter in decayed["params"]} == {2}


@pytest.mark.parametrize("name", ["sawtooth", "reduce_lr_on_plateau", "warmup_stable_decay"])
def test_a_schedule_that_cannot_be_served_is_named(name: str) -> None:
    optim = dataclasses.replace(CONFIG.optim, lr_scheduler_type=name)
    with pytest.raises(ValueError, match=f"lr_scheduler_type must.*got '{name}'"):
        build_schedule(engine_of().optimizer, optim, 10)
