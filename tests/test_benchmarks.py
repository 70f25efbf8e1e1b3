"""The benchmark suite: cells, jobs, bare products, measuring, and one very small run of it all."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import measure, memory, peers, provenance, roofline
from benchmarks.cells import (
    CUDA_GRID,
    DTYPES,
    GRID,
    ONE_PASS,
    QUICK,
    TWO_PASSES,
    Shape,
    parse_names,
    parse_shape,
)
from benchmarks.conftest import select
from benchmarks.rows import read
from benchmarks.workload import Results, first_rows, make_inputs, make_job
from mcpo_kernels.linear_logprob import cpu

ROOT = Path(__file__).parents[1]
SHAPE = Shape(520, 16, 300)


# Cells.


def test_shapes_are_read_as_they_are_written():
    for shape in GRID:
        assert parse_shape(str(shape)) == shape


@pytest.mark.parametrize("text", ["", "8x2", "8x2x3x4", "8x2x3x", "8xax3", "0x2x3", "-8x2x3"])
def test_what_is_no_shape_is_refused(text):
    with pytest.raises(ValueError, match=r"a shape must be NxDxV, such as .*, got"):
        parse_shape(text)


def test_rows_that_make_no_sequences_are_refused():
    with pytest.raises(ValueError, match="N must be a multiple of 8"):
        parse_shape("12x2x3")


def test_names_keep_their_order_and_must_be_known():
    assert parse_names("fp32, bf16", DTYPES, "--dtypes") == DTYPES
    with pytest.raises(ValueError, match="--dtypes must be out of bf16, fp32; got fp8"):
        parse_names("fp8,bf16", DTYPES, "--dtypes")


def options(**given: object) -> argparse.Namespace:
    names = ("quick", "shapes", "dtypes", "patterns", "impls")
    return argparse.Namespace(**{**dict.fromkeys(names), "device": "cpu", **given})


def test_options_select_cells():
    found = select(options(shapes="48x32x500", dtypes="fp32", impls="eager,mcpo"))
    assert [(cell.pattern, str(cell)) for cell in found] == [
        ("score", "mcpo"),
        ("score", "eager"),
        ("train", "mcpo"),
        ("train", "eager"),
        ("mcpo", "mcpo-one_pass"),
        ("mcpo", "eager-one_pass"),
        ("mcpo", "eager-two_passes"),
    ]
    assert {cell.shape for cell in found} == {(48, 32, 500)}
    assert {cell.shape for cell in select(options(quick=True))} == set(QUICK)
    assert {cell.shape for cell in select(options())} == set(GRID)
    with pytest.raises(ValueError, match=r"--impls must be out of mcpo, mcpo_cached, .*; got mine"):
        select(options(impls="mine"))


def test_a_gpu_has_peers_and_shapes_of_its_own():
    found = select(options(device="cuda", dtypes="bf16"))
    assert {cell.shape for cell in found} == set(CUDA_GRID)
    assert {cell.device for cell in found} == {"cuda"}
    names = {cell.impl for cell in found}
    assert {"mcpo_triton", "mcpo_portable", "eager", "trl_chunked", "cce_kernel", "quack"} <= names
    assert not {"mcpo", "mcpo_cached", "cce"} & names
    assert not {"mcpo_triton", "cce_kernel"} & {cell.impl for cell in select(options())}


def test_what_a_peer_is_measured_in():
    assert len(peers.named("mcpo").jobs) == 3
    assert len(peers.named("eager").jobs) == 4
    assert [pattern for pattern, _ in peers.named("liger_dpo").jobs] == ["score", "train"]


def test_a_missing_package_is_named_with_what_to_do():
    def missing() -> object:
        raise ModuleNotFoundError("No module named 'nothing'", name="nothing")

    peer = peers.Peer(name="other", title="Other", build=missing)
    with pytest.raises(peers.Missing, match=r"other needs nothing: python -m pip install .*bench"):
        peers.build(peer)


def test_a_kernel_that_was_not_built_says_why(monkeypatch):
    monkeypatch.setattr(cpu, "AVAILABLE", False)
    monkeypatch.setattr(cpu, "REASON", "no compiler")
    for name in ("mcpo", "mcpo_cached"):
        with pytest.raises(peers.Missing, match="impl='cpu' cannot run here: no compiler"):
            peers.build(peers.named(name))


# Jobs and bare products.


def test_both_ways_of_a_pattern_give_the_same():
    inputs = make_inputs(SHAPE, "fp32")
    assert 0.3 < inputs.drawn_M.shape[0] / SHAPE.num_tokens < 0.35
    one, two = (make_job(peers.eager, inputs, "mcpo", way)() for way in (ONE_PASS, TWO_PASSES))
    for first, second in zip(one, two, strict=True):
        torch.testing.assert_close(first, second)


def test_few_rows_are_the_first_ones():
    inputs = make_inputs(SHAPE, "fp32")
    few = first_rows(inputs, 8)
    for pattern in ("score", "train", "mcpo"):
        assert make_job(peers.eager, few, pattern, TWO_PASSES)().value.shape == (8,)
    assert few.drawn_M.tolist() == [0, 1, 4, 5]
    torch.testing.assert_close(few.hidden_ND, inputs.hidden_ND[:8])


def test_logits_spread_as_those_of_a_model():
    inputs = make_inputs(SHAPE, "fp32")
    logits = inputs.hidden_ND.detach() @ inputs.weight_VD.detach().T
    assert logits.std().item() == pytest.approx(3.0, rel=0.1)
    torch.testing.assert_close(inputs.hidden_ND, make_inputs(SHAPE, "fp32").hidden_ND)


@pytest.mark.parametrize("rows", [256, 520])
def test_bare_products_are_whole_products(rows, monkeypatch):
    monkeypatch.setattr(roofline, "CHUNK", rows)
    written: list[torch.Tensor] = []
    zeros_like = torch.zeros_like

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        written.append(zeros_like(tensor))
        return written[-1]

    monkeypatch.setattr(torch, "zeros_like", keep)
    # The chunked way, whichever is faster.
    monkeypatch.setattr(roofline, "_faster", lambda run, *_: roofline._try(run, rows))
    inputs = make_inputs(SHAPE, "fp32")
    products = roofline.make_products(inputs)
    hidden, weight = inputs.hidden_ND.detach(), inputs.weight_VD.detach()
    logits = hidden @ weight.T
    torch.testing.assert_close(written[0], logits @ weight, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(written[1], logits.T @ hidden, rtol=1e-4, atol=1e-3)
    assert {product.rows for product in products.values()} == {rows}
    taken = roofline.time_products(products, "train")
    assert list(taken) == ["forward", "dhidden", "dweight"]
    assert list(roofline.time_products(products, "score")) == ["forward"]


# Measuring.


def test_memory_is_what_a_job_needs_beyond_its_results():
    def job() -> Results:
        scratch = torch.ones(48 * 2**18)
        return Results(scratch[: 16 * 2**18].clone(), None, None)

    for _ in range(2):
        # The second time, too, after the allocator was given memory back.
        assert memory.peak_of(job).mib == pytest.approx(48, abs=4)


def test_memory_is_measured_in_another_process_and_its_death_is_no_answer(capfd):
    with memory.open_meter(Shape(64, 16, 65536), "fp32") as peak:
        # Logits and their log-softmax, 16 MiB each; the same after another job.
        for impl, slow in (("eager", False), ("mcpo_portable", True), ("eager", True)):
            found = peak(memory.Request(impl, "score", ONE_PASS, slow))
            assert found.mib == pytest.approx(32 if impl == "eager" else 4, abs=4)
            assert found.wall_seconds > 0
        for _ in range(2):
            with pytest.raises(RuntimeError, match="the process that measures memory ended with 1"):
                peak(memory.Request("nobody", "score", ONE_PASS, False))
    assert "StopIteration" in capfd.readouterr().err


def test_rounds_follow_the_products():
    calls: list[str] = []

    def pedantic(target, setup, rounds):
        for _ in range(rounds):
            setup()
            target()

    def job() -> Results:
        calls.append("job")
        began = time.process_time()
        while time.process_time() - began < 0.02:
            pass
        return Results(torch.zeros(1), None, None)

    def products() -> dict[str, float]:
        calls.append("products")
        return {"forward": 0.5}

    found = measure.run_rounds(pedantic, job, products, 3)
    assert calls == 3 * ["products", "job"]
    assert found.products == 3 * [{"forward": 0.5}]
    assert len(found.others) == 3
    for taken in found.taken:
        assert 0.02 / torch.get_num_threads() <= taken.seconds < 0.2
        assert taken.wall_seconds >= 0.02


def test_rounds_fit_into_the_budget():
    limits = measure.Limits(rounds=10, budget=20.0)
    assert [limits.rounds_of(each) for each in (0.1, 4.9, 15.0, 100.0)] == [10, 4, 1, 1]


def test_provenance_names_commit_and_machine():
    found = provenance.collect("pytest x")
    assert found.command == "pytest x"
    assert found.threads == torch.get_num_threads()
    assert found.torch == torch.__version__
    assert "family" in found.cpu
    head = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(head, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.commit == (commit.stdout.strip() or "unknown")


# All of it.


def test_a_very_small_run_writes_its_rows(tmp_path):
    pytest.importorskip("pytest_benchmark")
    path = tmp_path / "rows.jsonl"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "benchmarks/test_head.py", "--benchmark-only"),
            *("-p", "no:cacheprovider", "--shapes", "48x32x500", "--dtypes", "bf16"),
            *("--impls", "mcpo_portable,eager", "--rounds", "2", "--results", str(path)),
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = read(path)
    assert [str(row.cell) for row in rows] == [
        "mcpo_portable",
        "eager",
        "mcpo_portable",
        "eager",
        "mcpo_portable-one_pass",
        "eager-one_pass",
        "eager-two_passes",
    ]
    for row in rows:
        assert row.cell.shape == (48, 32, 500)
        assert len(row.seconds) == len(row.others) == len(row.gemm_seconds["forward"]) == 2
        assert min(row.seconds) > 0
        assert row.errors["value"] is not None
        assert (row.gradient_error is None) == (row.cell.pattern == "score")
        assert row.provenance.threads == 1
        assert row.provenance.wait_policy == "PASSIVE"
        assert "--impls" in row.provenance.command
    assert "### N = 48, D = 32, V = 500, bf16" in done.stdout
