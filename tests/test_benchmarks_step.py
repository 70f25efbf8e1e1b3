"""The benchmark of a step: its arms compute one gradient, its gate refuses what is wrong."""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import re
import sys

import pytest
import torch

from benchmarks.conftest import select_points
from benchmarks.peers import Missing
from benchmarks.step import flops, gate, memory, models, problem, session
from benchmarks.step.__main__ import main
from benchmarks.step.arms import ARMS, LAZY_NAMES, Built, named
from benchmarks.step.packed import PackedStep
from benchmarks.step.padded import PaddedStep, pad
from benchmarks.step.points import GRID, QUICK, Point, parse_point
from benchmarks.step.problem import Problem
from benchmarks.step.rows import read
from mcpo.records import TokenizedGroup

POINT = Point(model="tiny", dtype="fp32", prompt=5, completion=4, pool=3)
OURS = tuple(arm for arm in ARMS if not arm.is_trl)


def ragged_groups() -> tuple[TokenizedGroup, ...]:
    draw = random.Random(1)

    def ids(least: int, most: int) -> tuple[int, ...]:
        return tuple(draw.choices(range(8, models.VOCABULARY), k=draw.randint(least, most)))

    return tuple(
        TokenizedGroup(
            row_id=f"r{number}",
            prompt_ids=ids(1, 9),
            candidate_ids=tuple(ids(1, 7) for _ in range(size)),
        )
        for number, size in enumerate((4, 2, 6))
    )


def make(groups: tuple[TokenizedGroup, ...], dtype: str) -> Problem:
    return problem.make(models.load("tiny")[0], groups, dtype)


# Arms.


@pytest.mark.parametrize("mode", ["none", "light", "selective", "full"])
def test_a_step_of_mcpo_has_the_gradient_of_the_naive_one(mode):
    """In float64 throughout, so that a wrong mask cannot hide behind rounding."""
    posed = make(ragged_groups(), "fp64")
    ours, naive = (models.exact(models.load("tiny")[0]) for _ in range(2))
    loss = PackedStep(posed, ours, mode)()
    expected = PaddedStep(posed, naive, checkpointed=False, naive=True)()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    error = gate.relative_error(gate.gradients(ours), gate.gradients(naive))
    assert error < 1e-9
    # And of the step that the gate takes for exact.
    oracle = gate.make_oracle(posed, models.load("tiny")[0])
    assert gate.relative_error(gate.gradients(ours), oracle.exact.gradients) < 1e-9


def test_a_lazy_step_packs_three_candidates_and_has_the_same_gradient():
    posed = make(ragged_groups(), "fp64")
    ours = models.exact(models.load("tiny")[0])
    PackedStep(posed, ours, "light", lazy=True)()
    oracle = gate.make_oracle(posed, models.load("tiny")[0])
    assert gate.relative_error(gate.gradients(ours), oracle.exact.gradients) < 1e-9
    assert [group.num_candidates for group in posed.visited()] == [3, 2, 3]
    assert all(
        {0, drawn} <= set(group.columns)
        for group, drawn in zip(posed.visited(), posed.drawn, strict=True)
    )


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_arm_of_ours_passes_the_gate(dtype):
    said: list[str] = []
    ready = session.prepare(dataclasses.replace(POINT, dtype=dtype), OURS, None, said.append)
    assert len(said) == len(ready.arms) == len(OURS)
    modes = {each.arm.name: each.built.recompute for each in ready.arms}
    assert modes["mcpo_selective"] == "selective"
    assert modes["dpo"] == "none"
    assert modes["dpo_padded_checkpointed"] == "full"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_arm_of_trl_passes_the_gate(dtype):
    pytest.importorskip("trl")
    trl = [arm for arm in ARMS if arm.is_trl]
    assert len(trl) == 4
    session.prepare(dataclasses.replace(POINT, dtype=dtype), trl, None, print)


def test_rounds_time_every_arm_and_leave_no_gradient():
    chosen = [named("mcpo"), named("dpo")]
    ready = session.prepare(POINT, chosen, None, print)
    for number in range(2):
        ready.round(number)
    for each in ready.arms:
        assert len(each.taken) == len(each.others) == 2
        assert min(taken.seconds for taken in each.taken) > 0
        assert all(parameter.grad is None for parameter in each.model.parameters())
    one, other = (each.model for each in ready.arms)
    for first, second in zip(one.parameters(), other.parameters(), strict=True):
        assert first is not second
        assert first.data_ptr() == second.data_ptr()


# The gate.


def test_the_gate_refuses_a_wrong_gradient_and_a_wrong_loss():
    posed = make(ragged_groups(), "bf16")
    model = models.load("tiny")[0]
    oracle = gate.make_oracle(posed, model)
    loss = PaddedStep(posed.pairs(), model, checkpointed=False, naive=False)()
    errors = gate.check(loss, model, oracle, "it")
    assert 0 < errors.gradient <= errors.gradient_allowed
    with pytest.raises(AssertionError, match=r"it: the loss is off by .*, .* is allowed"):
        gate.check(loss + 2 * oracle.loss_allowed, model, oracle, "it")
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.grad.mul_(1 + 2 * oracle.gradient_allowed)
    with pytest.raises(AssertionError, match=r"it: the gradient is off by .*, .* is allowed"):
        gate.check(loss, model, oracle, "it")


def test_the_gate_refuses_another_draw():
    posed = make(ragged_groups(), "fp32")
    model = models.load("tiny")[0]
    oracle = gate.make_oracle(posed, model)
    # The first pool has three candidates.
    wrong = dataclasses.replace(posed, drawn=(posed.drawn[0] % 3 + 1, *posed.drawn[1:]))
    loss = PaddedStep(wrong.pairs(), model, checkpointed=False, naive=False)()
    with pytest.raises(AssertionError, match="it: the loss is off by"):
        gate.check(loss, model, oracle, "it")


# Problems.


def test_draws_do_not_hang_on_rounding():
    posed = make(ragged_groups(), "fp32")
    assert all(
        0 < column < group.num_candidates
        for column, group in zip(posed.drawn, posed.groups, strict=True)
    )
    pairs = posed.pairs()
    for group, whole, column in zip(pairs.groups, posed.groups, posed.drawn, strict=True):
        assert group.candidate_ids == (whole.candidate_ids[0], whole.candidate_ids[column])
        ref = posed.reference[group.row_id]
        assert pairs.reference[group.row_id] == (ref[0], ref[column])
    assert pairs.pairs() == pairs


def test_a_problem_survives_its_file(tmp_path):
    posed = make(ragged_groups(), "bf16")
    posed.save(tmp_path / "problem.json")
    assert problem.restore(tmp_path / "problem.json") == posed


def test_groups_come_from_a_file(candidates_file, tiny_tokenizer):
    point = dataclasses.replace(POINT, pool=2, groups=3, data="train.jsonl")
    groups = problem.groups_of(candidates_file, point, tiny_tokenizer)
    assert len(groups) == 3
    assert max(group.num_candidates for group in groups) == 3
    many = dataclasses.replace(point, groups=1000)
    with pytest.raises(ValueError, match=r"--groups must be at most \d+ for .*, got 1000"):
        problem.groups_of(candidates_file, many, tiny_tokenizer)


def test_points_are_read_as_they_are_written():
    assert parse_point("5x4x3", "tiny", "fp32") == POINT
    assert len({parse_point(text, "smollm2-135m", "bf16") for text in GRID}) == 16
    for text in ("5x4", "5x1x3", "0x4x3", "5xax3", "5x4x3x"):
        with pytest.raises(ValueError, match="a point must be PROMPTxCOMPLETIONxPOOL"):
            parse_point(text, "tiny", "fp32")


def options(**given: object) -> argparse.Namespace:
    names = ("quick", "points", "model", "dtypes")
    return argparse.Namespace(**{**dict.fromkeys(names), **given})


def test_options_select_points():
    found = select_points(options(points="5x4x3,6x4x3", model="tiny", dtypes="fp32"))
    assert found == [POINT, dataclasses.replace(POINT, prompt=6)]
    assert select_points(options(quick=True)) == list(QUICK)
    assert len(select_points(options())) == 2 * len(GRID)
    with pytest.raises(ValueError, match="--dtypes must be out of fp32, bf16; got fp8"):
        select_points(options(dtypes="fp8"))


# What is counted.


def test_operations_by_hand():
    model = models.load("tiny")[0]
    costs = flops.Costs.of(model)
    # Two layers: queries and output 32x32, keys and values 16x32, three of 64x32.
    assert costs == flops.Costs(
        token=2 * 2 * (2 * 1024 + 2 * 512 + 3 * 2048),
        pair=4 * 32 * 2,
        row=2 * 32 * 97,
        vocabulary=97,
    )
    group = TokenizedGroup(row_id="r", prompt_ids=(9, 9, 9), candidate_ids=((9, 9), (8, 8), (7, 7)))
    posed = Problem(groups=(group,), reference={"r": (0, 0, 0)}, step=0, drawn=(2,), dtype="fp32")
    unit = [
        flops.Costs(token=token, pair=pair, row=row, vocabulary=97)
        for token, pair, row in ((1, 0, 0), (0, 1, 0), (0, 0, 1))
    ]

    def counted(name: str, recompute: str) -> tuple[float, ...]:
        return tuple(flops.count(named(name), recompute, posed, each) for each in unit)

    # Packed: 3 + 3 tokens; 6 pairs of the prompt, and 3 + 1 of each candidate.
    assert counted("mcpo", "none") == (18, 3.5 * 18, 6 + 3 * 4)
    # Attention is not computed again, and logits are kept.
    assert counted("mcpo", "light") == (6 + 2 * 5, 18 + 2.5 * 14, 6 + 2 * 4)
    assert counted("mcpo", "selective") == (6 + 3 * 5, 18 + 3.5 * 14, 6 + 3 * 4)
    assert counted("mcpo", "full") == (24, 4.5 * 18, 6 + 3 * 4)
    # Chosen, drawn and one more: here the whole pool.
    assert counted("mcpo_lazy", "light") == counted("mcpo", "light")
    more = dataclasses.replace(
        posed,
        groups=(dataclasses.replace(group, candidate_ids=(*group.candidate_ids, (5, 5), (4, 4))),),
        reference={"r": (0,) * 5},
    )
    assert flops.packed_tokens(named("mcpo_lazy"), more) == 6
    assert flops.packed_tokens(named("mcpo"), more) == 8
    assert counted("dpo", "none") == (15, 3.5 * 14, 4 * 4)
    # Padded: 2 or 3 rows of 5 tokens, 15 pairs each.
    assert counted("dpo_padded", "none") == (30, 3.5 * 30, 3 * 4)
    assert counted("dpo_padded_checkpointed", "full") == (40, 4.5 * 30, 4 * 4)
    assert counted("mcpo_naive", "none") == (15 + 30, 45 + 3.5 * 30, 6 + 3 * 4)
    # Of TRL all positions but the last are scored.
    assert counted("trl_default", "full") == (40, 4.5 * 30, 4 * 8)
    assert counted("trl_eager", "none") == (30, 3.5 * 30, 3 * 8)
    # Of a vocabulary so large that half of the logits of six rows are kept.
    large = flops.Costs(token=0, pair=0, row=1, vocabulary=2 * 2**28 // (4 * 6))
    assert flops.count(named("mcpo"), "light", posed, large) == pytest.approx(6 + 2.5 * 4)
    tokens = [flops.packed_tokens(named(name), posed) for name in ("mcpo", "dpo", "mcpo_naive")]
    assert tokens == [6, 5, 25]


def test_padding_is_to_the_longest_on_the_right():
    padded = pad(ragged_groups(), torch.device("cpu"))
    lengths = [
        len(group.prompt_ids) + len(ids) for group in ragged_groups() for ids in group.candidate_ids
    ]
    assert padded.attended_SL.sum(dim=1).tolist() == lengths
    assert padded.token_SL.shape == (len(lengths), max(lengths))
    # What a scored row predicts stands right of it.
    targets = padded.token_SL.flatten()[padded.scored_N + 1]
    assert targets.equal(padded.batch.target_N)


# Memory.


def test_memory_is_that_of_a_second_step_beyond_the_weights(monkeypatch):
    calls: list[torch.Tensor] = []

    def build(*_: object) -> Built:
        def step() -> torch.Tensor:
            # The first step loads what stays.
            size = 16 if calls else 64
            calls.append(torch.ones(64 * 2**18) if not calls else torch.zeros(()))
            return torch.ones(size * 2**18).sum()

        return Built(step, "none")

    arm = dataclasses.replace(named("dpo"), build=build)
    monkeypatch.setattr(memory, "named", {"it": arm}.__getitem__)
    posed = make(problem.synthetic_groups(POINT, models.VOCABULARY), "fp32")
    peak = memory.measure("it", "tiny", posed)
    assert peak.num_bytes / 2**20 == pytest.approx(16, abs=4)
    assert peak.recompute == "none"
    assert len(calls) == 2


def test_a_process_that_died_is_no_answer(monkeypatch):
    monkeypatch.setattr(memory.sys, "executable", "/bin/false")
    posed = make(problem.synthetic_groups(POINT, models.VOCABULARY), "fp32")
    with pytest.raises(RuntimeError, match="the process that measures the memory of dpo ended"):
        memory.peak_of("dpo", "tiny", posed)


# All of it.


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_a_quick_run_prints_and_writes_what_it_measured(tmp_path, capsys):
    results, path = tmp_path / "rows.jsonl", tmp_path / "out.json"
    arguments = ["--quick", "--rounds", "2", "--no_memory", "--arms", "mcpo,dpo,mcpo_naive"]
    assert main([*arguments, "--results", str(results), "--json", str(path)]) == 0
    rows = read(results)
    assert [row.arm for row in rows] == ["mcpo", "dpo", "mcpo_naive"]
    for row in rows:
        assert row.point == QUICK[0]
        assert len(row.seconds) == len(row.wall_seconds) == len(row.others) == 2
        assert row.errors["gradient"] <= row.errors["gradient_allowed"]
        assert str(tmp_path) not in row.provenance.command
        assert "--results rows.jsonl" in row.provenance.command
    found = json.loads(path.read_text())
    assert found["seconds"].keys() == {"mcpo", "dpo", "mcpo_naive"}
    assert found["ratios"]["seconds"]["mcpo"] == 1.0
    assert found["flop_ratio"] == pytest.approx(rows[0].flops / rows[1].flops)
    assert found["trl_best"] is None
    assert found["rounds"] == 2
    assert [bar["passed"] for bar in found["bars"]] == [
        bar["measured"] <= bar["limit"] if bar["at_most"] else bar["measured"] >= bar["limit"]
        for bar in found["bars"]
    ]
    printed = capsys.readouterr().out
    assert re.search(r"mcpo / dpo: \d+\.\d\d of the time, \d+\.\d\d of the FLOPs", printed)


@pytest.mark.usefixtures("threads")
def test_lazy_scoring_is_measured_beside_steps_on_a_pair(tmp_path, capsys):
    results = tmp_path / "rows.jsonl"
    arguments = ["--quick", "--rounds", "1", "--no_memory", "--scoring", "lazy"]
    assert main([*arguments, "--results", str(results)]) == 0
    assert [row.arm for row in read(results)] == list(LAZY_NAMES)
    assert re.search(r"time, mcpo_lazy / dpo_padded \| \d+\.\d\d", capsys.readouterr().out)


@pytest.mark.usefixtures("threads")
def test_memory_alone_is_a_row_without_seconds(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "peak_of", lambda *_: memory.Peak(77, "light"))
    results = tmp_path / "rows.jsonl"
    arguments = ["--quick", "--no_time", "--arms", "mcpo", "--results", str(results)]
    assert main(arguments) == 0
    (row,) = read(results)
    assert (row.arm, row.peak_bytes, row.recompute) == ("mcpo", 77, "light")
    assert (row.seconds, row.errors) == ((), {})


@pytest.mark.usefixtures("threads")
def test_rows_of_a_file_are_measured(candidates_file, tmp_path):
    results = tmp_path / "rows.jsonl"
    arguments = ["--model", "tiny", "--data", str(candidates_file), "--groups", "4", "--pool", "3"]
    arms = ["--arms", "mcpo,dpo,dpo_padded", "--rounds", "1", "--no_memory"]
    assert main([*arguments, *arms, "--results", str(results)]) == 0
    for row in read(results):
        assert row.point.lengths == f"4 rows of {candidates_file.name}"
        assert f"--data {candidates_file.name} " in row.provenance.command


@pytest.mark.usefixtures("threads")
def test_rounds_stop_where_the_budget_does(tmp_path):
    results = tmp_path / "rows.jsonl"
    arguments = ["--quick", "--no_memory", "--arms", "dpo", "--results", str(results)]
    assert main([*arguments, "--rounds", "50", "--budget", "0"]) == 0
    (row,) = read(results)
    assert len(row.seconds) == 1


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pool", "0"], "--pool must be at least 1, got 0"),
        (["--completion", "1"], "--completion must be at least 2, got 1"),
        (["--data", "nowhere.jsonl"], "--data must name a file, got nowhere.jsonl"),
        (["--quick", "--arms", "ours"], "--arms must be out of mcpo, .*; got ours"),
        (["--no_time", "--no_memory"], "--no_time goes with none of"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments, message, capsys):
    assert main(arguments) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl.trainer.dpo_config", None)
    posed = make(problem.synthetic_groups(POINT, models.VOCABULARY), "fp32")
    model, tokenizer = models.load("tiny")
    with pytest.raises(Missing, match=r"the arms of TRL need .*: pip install"):
        named("trl_default").build(posed.pairs(), model, tokenizer)
