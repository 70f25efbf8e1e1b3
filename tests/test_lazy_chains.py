"""Persistent chains in a run: what is packed, what is remembered, and by whom."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from conftest import build_model

from mcpo.cli import make_config
from mcpo.config import POOL_LOSSES, Config, KernelConfig
from mcpo.engine.single import SingleEngine
from mcpo.lazy_chains import LazyChains, largest_visit
from mcpo.losses import LOSSES
from mcpo.optimizer import build_optimizer
from mcpo.pack import pack
from mcpo.policy import Policy
from mcpo.recompute import largest_micro_batch, share_with_gradient
from mcpo.records import TokenizedGroup
from mcpo.reference import NoReference
from mcpo.reference_cache import ReferenceLogps
from mcpo.step import StepWork, train_step

CPU = torch.device("cpu")


def group_of(number: int, candidates: int = 6) -> TokenizedGroup:
    return TokenizedGroup(
        row_id=f"r{number}",
        prompt_ids=(2, 10 + number % 7),
        candidate_ids=tuple((20 + column, 30 + number % 9, 3) for column in range(candidates)),
    )


GROUPS = [group_of(number, 2 + number % 5) for number in range(7)]
REFERENCES = ReferenceLogps(
    logps={
        group.row_id: tuple(-5.0 - 0.3 * column for column in range(group.num_candidates))
        for group in GROUPS
    }
)


def config_of(**options: Any) -> Config:
    return make_config({"scoring": "lazy", "max_grad_norm": 1e9, "warmup_ratio": 0.0} | options)


def chains_of(config: Config, groups: list[TokenizedGroup] = GROUPS) -> LazyChains:
    return LazyChains(groups, REFERENCES, config)


def engine_of(config: Config) -> SingleEngine:
    policy = Policy(build_model().double().train(), head_impl="auto", autocast_dtype=None)
    return SingleEngine(policy, build_optimizer(policy, config.optim), CPU)


def work_of(
    chains: LazyChains, step: int, *, weight: float = 1.0, audited: bool = False
) -> StepWork:
    """All groups in one batch."""
    packed = chains.reduced(GROUPS, step)
    whole = pack(GROUPS, share_prefix=True)
    return StepWork(
        step=step,
        batches=(pack(packed, share_prefix=True),),
        num_prompts=len(GROUPS),
        weight=weight,
        rows=tuple(range(len(GROUPS))),
        visits=(chains.at(packed, step, CPU),),
        audits=((whole, chains.at(GROUPS, step, CPU)),) if audited else (),
    )


def state_of(chains: LazyChains) -> dict[str, list[Any]]:
    return {name: value.tolist() for name, value in chains.state_dict().items()}


# How chains begin.


@pytest.mark.parametrize(("score", "slope"), [("log_ratio", 0.0), ("logp", -0.3)])
def test_chains_begin_in_a_draw_by_the_references_score(score: str, slope: float) -> None:
    groups = [group_of(number, 5) for number in range(4000)]
    logps = tuple(-0.3 * column for column in range(5))
    references = ReferenceLogps(logps={group.row_id: logps for group in groups})
    chains = LazyChains(groups, references, config_of(score=score))
    state = chains.state_dict()
    assert torch.equal(state["seen"], torch.full((4000, 5), -1))
    weight = torch.softmax(slope * torch.arange(1.0, 5.0), dim=0)
    observed = torch.bincount(state["state"][:, 0], minlength=5)[1:].double()
    chi_squared = float(((observed - 4000 * weight).square() / (4000 * weight)).sum())
    # The 1 - 1e-6 quantile with 3 degrees of freedom.
    assert chi_squared < 30.66
    # Of a row alone, whatever other rows there are.
    alone = LazyChains(groups[7:8], references, config_of(score=score)).state_dict()["state"]
    assert torch.equal(alone, state["state"][7:8])


def test_a_live_reference_has_a_ratio_before_training_and_no_log_probabilities() -> None:
    """What a lazy run begins with is known, or asked for; it never scores fully instead."""
    known = LazyChains(GROUPS, NoReference(), config_of()).state_dict()["known"]
    assert torch.equal(known, chains_of(config_of()).state_dict()["known"])
    assert not known.any()
    with pytest.raises(ValueError, match="score: logp begins with log-probabilities of the refere"):
        LazyChains(GROUPS, NoReference(), config_of(score="logp"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": ["mcpo", "infonca"]}, r"needs losses of drawn negatives, .* \['infonca'\]"),
        ({"augmented": True}, r"needs losses of drawn negatives, .* \['augmented'\]"),
        ({"loss_type": "mcpo_unbiased"}, "temperature 1, chain none, scoring full, with several"),
    ],
)
def test_losses_that_need_more_than_a_chain_gives_are_refused(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        config_of(**options)
    if "mcpo_unbiased" in options.values():
        with pytest.raises(ValueError, match=message):
            make_config(options | {"chain": "subset"})


def test_losses_over_whole_pools_are_the_ones_that_are_refused() -> None:
    whole = {name for name, loss in LOSSES.items() if loss.negatives == "pool"}
    assert whole == set(POOL_LOSSES)


# What is packed.


@pytest.mark.parametrize("chain_steps", [1, 2])
def test_the_chosen_one_states_and_proposals_are_packed_and_nothing_else(chain_steps: int) -> None:
    chains = chains_of(config_of(chain_steps=chain_steps, num_negatives=2, replacement=True))
    packed = chains.reduced(GROUPS, 3)
    lazy = chains.at(packed, 3, CPU)
    for prompt, (group, whole) in enumerate(zip(packed, GROUPS, strict=True)):
        asked = {*lazy.state_PM[prompt].tolist(), *lazy.proposal_PMK[prompt].flatten().tolist()}
        assert group.columns == (0, *sorted(asked))
        assert group.candidate_ids == tuple(whole.candidate_ids[c] for c in group.columns)
        assert lazy.column_PC[prompt, : group.num_candidates].tolist() == list(group.columns)
        assert max(group.columns) < whole.num_candidates
    batch = pack(packed, share_prefix=True)
    reference_PC = REFERENCES.of(batch)
    expected = [-5.0 - 0.3 * column for column in packed[4].columns]
    assert reference_PC[4, : len(expected)].tolist() == pytest.approx(expected)
    # Again, in other company and order: the same.
    backwards = chains.reduced(GROUPS[::-1], 3)
    assert backwards == packed[::-1]
    assert chains.reduced(GROUPS, 4) != packed


def test_a_lazy_step_has_the_gradient_of_the_pair_it_draws() -> None:
    config = config_of()
    engine, chains = engine_of(config), chains_of(config)
    work = work_of(chains, 0)
    gradients: list[torch.Tensor] = []

    def keep() -> None:
        found = [parameter.grad for parameter in engine.policy.parameters()]
        gradients.append(torch.cat([each.reshape(-1) for each in found if each is not None]))

    engine.optimizer.step = keep  # pyright: ignore[reportAttributeAccessIssue]
    train_step(engine, work, REFERENCES, config, chains)
    drawn = chains.state_dict()["state"][:, 0].tolist()
    pairs = [group.only((0, column)) for group, column in zip(GROUPS, drawn, strict=True)]
    plain = make_config({"max_grad_norm": 1e9, "warmup_ratio": 0.0})
    pair_work = StepWork(step=0, batches=(pack(pairs, share_prefix=True),), num_prompts=7)
    train_step(engine, pair_work, REFERENCES, plain)
    assert gradients[0].norm() > 0.01
    # The norms of Llama compute in float32.
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


def test_tokens_and_gradients_are_counted_for_what_a_step_packs() -> None:
    group = TokenizedGroup(
        row_id="a", prompt_ids=(1,) * 10, candidate_ids=((2,) * 5, (3,) * 9, (4,) * 3, (5,) * 6)
    )
    lazy, full = config_of(max_tokens_per_micro_batch=1), KernelConfig()
    assert largest_visit(group, full) is group
    assert largest_visit(group, lazy.kernel).columns == (0, 1, 3)
    assert largest_micro_batch(lazy, [group]) == 10 + 4 + 8 + 5
    # Pools of 5 tokens in the mean: 10 + 4 + 5 of 10 + 4 + 2 * 5 have a gradient.
    assert share_with_gradient([group], 1, True, num_scored=2) == pytest.approx(19 / 24)


# What is remembered.


def test_a_step_moves_the_chains_and_keeps_the_scores_it_took() -> None:
    config = config_of()
    engine, chains = engine_of(config), chains_of(config)
    before = {name: value.clone() for name, value in chains.state_dict().items()}
    work = work_of(chains, 5)
    metrics = train_step(engine, work, REFERENCES, config, chains)
    after = chains.state_dict()
    for number, group in enumerate(chains.reduced(GROUPS, 5)):
        del group
        packed = work.batches[0].columns[number][1:]
        assert after["state"][number].item() in packed
        for column in range(1, before["known"].shape[1]):
            scored = column in packed
            assert (after["seen"][number, column] == 5) == scored
            kept = after["known"][number, column] == before["known"][number, column]
            assert kept != scored
    assert (after["known"][:, 0] == 0).all()
    # Everything was last seen before step 0.
    assert metrics["mc/staleness"] == 6.0
    assert metrics["mc/drift"] > 0
    assert 0 <= metrics["mc/acceptance"] <= 1
    assert "mc/lazy_tv" not in metrics


def test_several_chains_move_by_several_proposals_in_one_forward() -> None:
    config = config_of(num_negatives=2, replacement=True, chain_steps=3)
    engine, chains = engine_of(config), chains_of(config)
    for step in range(3):
        work = work_of(chains, step)
        metrics = train_step(engine, work, REFERENCES, config, chains)
        state_PM = chains.state_dict()["state"]
        assert state_PM.shape == (7, 2)
        for states, columns in zip(state_PM.tolist(), work.batches[0].columns, strict=True):
            assert set(states) <= set(columns[1:])
            assert len(columns) <= 1 + 2 * (1 + 3)
        assert 0 <= metrics["mc/acceptance"] <= 1
    assert any(first != second for first, second in chains.state_dict()["state"].tolist())


def test_a_rank_without_rows_moves_nothing() -> None:
    config = config_of()
    chains = chains_of(config)
    before = state_of(chains)
    work = work_of(chains, 0, weight=0.0, audited=True)
    train_step(engine_of(config), work, REFERENCES, config, chains)
    assert state_of(chains) == before


def test_an_audit_scores_whole_pools_and_measures_the_distance() -> None:
    config = config_of(lazy_audit_steps=1)
    engine, chains = engine_of(config), chains_of(config)
    metrics = train_step(engine, work_of(chains, 2, audited=True), REFERENCES, config, chains)
    assert 0 < metrics["mc/lazy_tv"] < 1
    assert 0 < metrics["mc/stale_tv"] < 1
    state = chains.state_dict()
    for group, seen_F in zip(GROUPS, state["seen"], strict=True):
        assert seen_F[1 : group.num_candidates].tolist() == [2] * (group.num_candidates - 1)
        assert (seen_F[group.num_candidates :] == -1).all()
    # Nothing was learnt since: what is known is exact but for one small update.
    again = train_step(engine, work_of(chains, 3, audited=True), REFERENCES, config, chains)
    assert again["mc/stale_tv"] < 0.2 * metrics["mc/stale_tv"]
    assert again["mc/acceptance"] > 0.9


class OneOfTwo:
    """The part of an engine that chains use, for two ranks in two threads."""

    device = CPU

    def __init__(self, rank: int, given: list[torch.Tensor], barrier: threading.Barrier) -> None:
        self._rank, self._given, self._barrier = rank, given, barrier

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        self._given[self._rank] = values
        self._barrier.wait(timeout=30)
        return self._given[0] + self._given[1]


def test_two_ranks_know_what_one_would_whoever_met_a_prompt() -> None:
    config = config_of()
    score_PC = torch.randn(7, 6, generator=torch.Generator().manual_seed(0)).double()
    one = chains_of(config)
    rows = (4, 2, 0, 5)

    def note(chains: LazyChains, some: tuple[int, ...]) -> None:
        groups = chains.reduced([GROUPS[row] for row in some], 9)
        batch = pack(groups, share_prefix=True)
        last = torch.tensor([[group.columns[-1]] for group in groups])
        chains.note(batch, score_PC[list(some)][:, : batch.mask_PC.shape[1]], last)

    note(one, rows)
    one.agree(engine_of(config), rows, 9)
    assert state_of(one) != state_of(chains_of(config))
    for shares in (((4, 2), (0, 5)), ((5,), (2, 0, 4)), ((), (0, 2, 4, 5))):
        both = [chains_of(config), chains_of(config)]
        given, barrier = [torch.zeros(())] * 2, threading.Barrier(2)

        def rank(number: int, both=both, given=given, barrier=barrier, shares=shares) -> None:
            if shares[number]:
                note(both[number], shares[number])
            engine: Any = OneOfTwo(number, given, barrier)
            both[number].agree(engine, rows, 9)

        threads = [threading.Thread(target=rank, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert state_of(both[0]) == state_of(both[1]) == state_of(one)


def test_chains_go_on_from_what_was_saved() -> None:
    config = config_of()
    engine, chains = engine_of(config), chains_of(config)
    for step in range(3):
        train_step(engine, work_of(chains, step), REFERENCES, config, chains)
    saved = {name: value.clone() for name, value in chains.state_dict().items()}
    restored = chains_of(config)
    assert state_of(restored) != state_of(chains)
    restored.load_state_dict(saved)
    assert state_of(restored) == state_of(chains)
    assert restored.reduced(GROUPS, 3) == chains.reduced(GROUPS, 3)
    other = LazyChains(GROUPS[:3], REFERENCES, config)
    with pytest.raises(ValueError, match=r"known must have shape \(3, 4\), got \(7, 6\); resume"):
        other.load_state_dict(saved)
