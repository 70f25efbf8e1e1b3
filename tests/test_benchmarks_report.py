"""Rows, tables, figures and the page that is made of them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from benchmarks import peers, report, tables
from benchmarks.cells import ONE_PASS, TWO_PASSES, Cell, Shape
from benchmarks.plots import draw
from benchmarks.rows import FULL, Provenance, Row, append, latest, read

ROOT = Path(__file__).parents[1]
SHAPE = Shape(48, 32, 500)
ORIGIN = Provenance(
    date="2026-01-02T03:04:05+00:00",
    commit="abc1234",
    dirty=False,
    command="pytest benchmarks",
    cpu="A CPU (family 1, model 2)",
    flags=("avx2",),
    cores=2,
    threads=2,
    wait_policy="PASSIVE",
    torch="2.13.0",
)


def make_row(
    impl: str,
    pattern: str = "train",
    seconds: tuple[float, ...] = (8.0,),
    *,
    way: str = ONE_PASS,
    memory: float = 10.0,
    scalar: bool = False,
    shape: Shape = SHAPE,
    origin: Provenance = ORIGIN,
) -> Row:
    products = ("forward",) if pattern == "score" else ("forward", "dhidden", "dweight")
    trained = None if pattern == "score" else 2e-3
    return Row(
        cell=Cell(shape=shape, dtype="bf16", pattern=pattern, way=way, impl=impl),
        title=impl.replace("_", " "),
        version="torch 2.13.0",
        ours=impl.startswith("mcpo"),
        scalar=scalar,
        drawn=0.25,
        seconds=seconds,
        wall_seconds=seconds,
        others=tuple(0.5 for _ in seconds),
        gemm_seconds=dict.fromkeys(products, (1.0, 2.0, 9.0)),
        gemm_rows=dict.fromkeys(products, 48),
        memory_mib=memory,
        errors={"value": 1e-2, "dhidden": trained, "dweight": trained and trained / 2},
        provenance=origin,
    )


ROWS = [
    make_row("mcpo", "score", (2.0,)),
    make_row("mcpo", "train", (8.0,), memory=4.0),
    make_row("mcpo", "mcpo", (4.0,), memory=4.0),
    make_row("eager", "score", (3.0,), memory=100.0),
    make_row("eager", "train", (16.0,), memory=100.0),
    make_row("eager", "mcpo", (14.0,), memory=100.0),
    make_row("eager", "mcpo", (10.5,), way=TWO_PASSES, memory=50.0),
    make_row("compile", "train", (12.0,), memory=60.0),
    make_row("dpo", "train", (6.0,), scalar=True),
]


def test_the_page_is_what_the_rows_give(tmp_path):
    rows = latest(read(FULL))
    figures = draw(rows, tmp_path)
    assert (ROOT / "docs" / "benchmarks.md").read_text() == report.page(rows, figures), (
        "run `python -m benchmarks.report`"
    )
    drawn = sorted(path.name for path in (ROOT / "docs" / "benchmarks").glob("head-*.svg"))
    assert drawn == sorted(figures)


def test_every_tracked_row_can_be_read_and_passed_the_gate():
    for row in read(FULL):
        for name in ("value", "dhidden", "dweight"):
            error = row.errors[name]
            allowed = row.errors[f"{name}_allowed"]
            assert (error is None) == (allowed is None)
            assert error is None or (allowed is not None and error <= allowed)


def test_a_row_survives_its_file(tmp_path):
    path = tmp_path / "deep" / "rows.jsonl"
    for row in ROWS:
        append(row, path)
    assert read(path) == ROWS
    assert read(tmp_path / "none.jsonl") == []
    assert json.loads(path.read_text().splitlines()[0])["provenance"]["commit"] == "abc1234"


def test_the_last_row_of_a_cell_counts_and_machines_are_not_mixed():
    other = dataclasses.replace(ORIGIN, cpu="another")
    old, new = make_row("eager", seconds=(1.0,)), make_row("eager", seconds=(2.0,))
    foreign = make_row("compile", origin=other)
    assert latest([old, foreign, new]) == [new]
    assert latest([old, new, foreign]) == [foreign]
    later = dataclasses.replace(ORIGIN, date="2027", commit="def", command="other")
    assert latest([old, make_row("compile", origin=later)])[0] == old
    assert latest([]) == []


def test_ratios_are_those_of_medians():
    row = make_row("eager", seconds=(7.0, 8.0, 100.0))
    assert row.median == 8.0
    # The median of each product is 2.
    assert [row.ratio(count) for count in (1, 3, 4)] == [4.0, 8 / 6, 1.0]
    # All rows once, and three products of a quarter of the rows.
    assert row.ratio(2) == 8.0 / (2 + 0.25 * 6)
    assert row.gradient_error == 2e-3
    assert make_row("eager", "score").gradient_error is None


def test_tables_take_the_better_way_and_sort_by_speed():
    lines = tables.one_shape(ROWS).splitlines()
    names = [line.split("|")[1].strip() for line in lines[2:]]
    assert names == ["**mcpo**", "compile", "eager", "dpo"]
    eager = [cell.strip() for cell in lines[4].split("|")[2:-1]]
    assert eager == [
        "3 (1.50)",
        "16 (2.00, 2.67)",
        "10.5 (3.00), two passes",
        "100, 100, 50",
        "1.0e-02",
        "2.0e-03",
        "0.5",
    ]
    assert [cell.strip() for cell in lines[3].split("|")[2:5]] == ["-", "12 (1.50, 2.00)", "-"]


def test_ours_are_compared_with_the_fastest_that_does_the_job():
    lines = tables.ours_against_the_best(ROWS).splitlines()
    rows = [[cell.strip() for cell in line.split("|")[3:-1]] for line in lines[2:]]
    assert rows == [
        ["score", "eager", "3", "100", "1.50x, 10x"],
        ["train", "compile", "12", "60", "1.50x, 15x"],
        ["MC-PO", "eager, two passes", "10.5", "50", "2.62x, 12x"],
    ]


def test_shapes_are_in_order_and_named():
    large = make_row("eager", shape=Shape(48, 64, 500))
    text = tables.all_shapes([large, *ROWS])
    titles = [line for line in text.splitlines() if line.startswith("#")]
    assert titles == ["### N = 48, D = 32, V = 500, bf16", "### N = 48, D = 64, V = 500, bf16"]


def test_the_page_says_where_its_rows_come_from(tmp_path):
    dirty = dataclasses.replace(ORIGIN, commit="fed", dirty=True)
    text = report.page([*ROWS, make_row("late", origin=dirty)], {"a.svg": "a figure"})
    for part in (
        "A CPU (family 1, model 2), avx2; 2 cores, 2 threads, OMP_WAIT_POLICY=PASSIVE",
        "10 rows, 2026-01-02T03:04:05+00:00 to",
        "commits abc1234, fed with changes",
        "- eager: torch 2.13.0",
        "![a figure](benchmarks/a.svg)",
    ):
        assert part in text
    assert "$" not in text


def test_a_page_without_rows_says_so():
    assert report.page([], {}).count("None yet.") == 4


def test_figures_are_small_and_the_same_every_time(tmp_path):
    # As many implementations as there are, and few rows, which the figure leaves out.
    many = [
        make_row(peer.name, pattern, (1.0 + number,), memory=10.0**number)
        for number, peer in enumerate(peers.PEERS)
        for pattern in ("score", "train", "mcpo")
    ]
    many += [
        dataclasses.replace(row, cell=dataclasses.replace(row.cell, dtype="fp32")) for row in many
    ]
    many += [make_row("mcpo", shape=Shape(24, 32, 500))]
    figures = draw(many, tmp_path / "first")
    assert figures == {"head-32x500.svg": "time against memory, N = 48, D = 32, V = 500"}
    assert draw(many, tmp_path / "second") == figures
    first = (tmp_path / "first" / "head-32x500.svg").read_bytes()
    assert first == (tmp_path / "second" / "head-32x500.svg").read_bytes()
    assert len(first) < 150_000
    assert draw([], tmp_path) == {}


def test_the_report_is_written_from_the_command_line(tmp_path, monkeypatch, capsys):
    for row in ROWS:
        append(row, tmp_path / "rows.jsonl")
    arguments = ["report", "--results", str(tmp_path / "rows.jsonl"), "--docs", str(tmp_path)]
    monkeypatch.setattr("sys.argv", arguments)
    report.main()
    text = (tmp_path / "benchmarks.md").read_text()
    assert "benchmarks/head-32x500.svg" in text
    assert (tmp_path / "benchmarks" / "head-32x500.svg").is_file()
    assert "benchmarks.md" in capsys.readouterr().out


@pytest.mark.parametrize("memory", [-3.0, 0.0])
def test_memory_is_never_below_zero(memory):
    assert tables.memory(make_row("mcpo", memory=memory)) == 0.0
