"""Every implementation of the head, in every pattern of use, on every shape.

    python -m pytest benchmarks/test_head.py --benchmark-only --quick

Each cell: one call, whose results must pass the gate; two in another process for memory; then
rounds, each right after the bare products it is compared with.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import torch

from benchmarks import gate, peers, roofline
from benchmarks.cells import Cell
from benchmarks.measure import Limits, Rounds, run_rounds, timed
from benchmarks.memory import Peak, Request
from benchmarks.rows import Provenance, Row
from benchmarks.workload import Head, make_job

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

    from benchmarks.conftest import Workload

# A job whose first call takes longer is not called in full to warm up for its memory.
SLOW_SECONDS = 30.0


def test_head(
    work: Workload,
    cell: Cell,
    head: Head,
    benchmark: BenchmarkFixture,
    limits: Limits,
    origin: Provenance,
    record: Callable[[Row], None],
) -> None:
    """Gate a cell, measure it, write its row."""
    job = make_job(head, work.inputs, cell.pattern, cell.way)
    try:
        results, first = timed(job, cell.device)
    except torch.OutOfMemoryError as error:
        pytest.skip(f"{cell.impl} does not fit: {str(error).partition('. ')[0]}")
    upstream_N = work.inputs.drawn_grad_N if cell.pattern == "mcpo" else work.inputs.grad_N
    errors = gate.check(results, work.oracle, work.inputs, upstream_N, str(cell))
    # Large, and not needed any more.
    del results

    slow = first.wall_seconds > SLOW_SECONDS and not peers.named(cell.impl).compiled
    peak = work.peak(Request(cell.impl, cell.pattern, cell.way, slow))

    def products() -> dict[str, float]:
        return roofline.time_products(work.products, cell.pattern)

    each = peak.wall_seconds + roofline.wall_seconds(work.products, cell.pattern)
    found = run_rounds(benchmark.pedantic, job, products, limits.rounds_of(each), cell.device)
    row = make_row(cell, work, found, peak, errors, origin)
    benchmark.extra_info.update(dataclasses.asdict(row))
    if benchmark.enabled:
        record(row)


def make_row(
    cell: Cell,
    work: Workload,
    found: Rounds,
    peak: Peak,
    errors: gate.Errors,
    origin: Provenance,
) -> Row:
    """What was measured of a cell."""
    peer = peers.named(cell.impl)
    names = roofline.PRODUCTS[cell.pattern]
    return Row(
        cell=cell,
        title=peer.title,
        version=peers.version(peer),
        ours=peer.ours,
        scalar=peer.scalar,
        drawn=work.inputs.drawn_M.shape[0] / cell.shape.num_tokens,
        seconds=tuple(taken.seconds for taken in found.taken),
        wall_seconds=tuple(taken.wall_seconds for taken in found.taken),
        others=tuple(found.others),
        gemm_seconds={name: tuple(each[name] for each in found.products) for name in names},
        gemm_rows={name: work.products[name].rows for name in names},
        memory_mib=peak.mib,
        errors=dataclasses.asdict(errors),
        provenance=origin,
    )
