"""Rows of steps, bars, tables, figures and the page that is made of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from test_benchmarks_report import ORIGIN

from benchmarks import provenance, report
from benchmarks.step import tables
from benchmarks.step.arms import NAMES, TRL_BEST
from benchmarks.step.bars import bars, flop_ratio, with_best
from benchmarks.step.plots import draw
from benchmarks.step.points import Point
from benchmarks.step.rows import FULL, Row, append, latest, read

ROOT = Path(__file__).parents[1]
POINT = Point(model="tiny", dtype="fp32", prompt=5, completion=4, pool=3)
SECONDS = {
    "mcpo": 3.0,
    "mcpo_selective": 4.0,
    "mcpo_lazy": 2.8,
    "dpo": 2.0,
    "dpo_padded": 3.5,
    "dpo_padded_checkpointed": 4.0,
    "mcpo_naive": 6.0,
    "trl_default": 8.0,
    "trl_fused": 6.0,
    "trl_eager_checkpointed": 5.0,
    "trl_eager": 4.0,
}


def make_row(arm: str, **changes: object) -> Row:
    row = Row(
        point=POINT,
        arm=arm,
        recompute="light" if arm == "mcpo" else "none",
        seconds=(9.0, SECONDS[arm], 1.0),
        wall_seconds=(9.0, SECONDS[arm], 1.0),
        others=(0.0, 0.5, 1.0),
        peak_bytes=2**20 * NAMES.index(arm),
        flops=3e9 if arm == "mcpo" else 2e9,
        tokens=100,
        errors={"loss": 1e-5, "loss_allowed": 1e-4, "gradient": 1e-3, "gradient_allowed": 1e-2},
        versions="transformers 5",
        provenance=ORIGIN,
    )
    return dataclasses.replace(row, **changes)  # pyright: ignore[reportArgumentType]


ROWS = [make_row(arm) for arm in NAMES]
ARMS = {row.arm: row for row in ROWS}


def test_the_page_is_what_the_rows_give(tmp_path):
    found = latest(read(FULL))
    figures = draw(found, tmp_path)
    page = report.step_page(found, figures)
    assert (ROOT / "docs" / "benchmarks_step.md").read_text() == page, (
        "run `python -m benchmarks.report`"
    )
    drawn = sorted(path.name for path in (ROOT / "docs" / "benchmarks").glob("step-*.svg"))
    assert drawn == sorted(figures)


def test_every_tracked_row_passed_the_gate():
    for row in read(FULL):
        if not row.seconds:
            continue
        assert row.errors["loss"] <= row.errors["loss_allowed"]
        assert row.errors["gradient"] <= row.errors["gradient_allowed"]


def test_a_row_survives_its_file(tmp_path):
    path = tmp_path / "deep" / "rows.jsonl"
    append(ROWS[:4], path)
    append(ROWS[4:], path)
    assert read(path) == ROWS
    assert read(tmp_path / "none.jsonl") == []


def test_arms_of_one_session_are_compared():
    later = dataclasses.replace(ORIGIN, date="2026-01-03T00:00:00+00:00")
    again = [make_row(arm, provenance=later, peak_bytes=None) for arm in ("mcpo", "dpo")]
    memory = make_row("dpo", provenance=later, peak_bytes=77, seconds=())
    found = latest([*ROWS, *again, memory])
    assert found.keys() == {POINT}
    assert found[POINT].keys() == {"mcpo", "dpo"}
    # A peak may be of another session, and the last one counts.
    assert found[POINT]["dpo"].peak_bytes == 77
    assert found[POINT]["mcpo"].peak_bytes == 0
    assert found[POINT]["dpo"].seconds == again[1].seconds
    # Of another machine nothing is compared.
    other = make_row("dpo", provenance=dataclasses.replace(ORIGIN, threads=1))
    assert latest([*ROWS, other]) == {POINT: {"dpo": other}}
    assert latest([]) == {}


def test_the_best_of_trl_is_the_fastest():
    assert with_best(ARMS)[TRL_BEST].arm == "trl_eager"
    assert TRL_BEST not in with_best({"mcpo": ARMS["mcpo"]})


def test_bars_by_hand():
    found = {bar.name: bar for bar in bars(ARMS)}
    measured = {name: round(bar.measured, 3) for name, bar in found.items()}
    assert measured == {
        "time, mcpo / trl_default": 0.375,
        "time, mcpo / trl_best": 0.75,
        "peak, mcpo / trl_default": 0.0,
        "peak, mcpo / trl_best": 0.0,
        "peak, mcpo_selective / trl_default": round(1 / 7, 3),
        "time, mcpo / dpo_padded": 0.857,
        "time, mcpo_selective / dpo_padded_checkpointed": 1.0,
        # 1.5 of the time, 1.5 of the operations.
        "time, mcpo / dpo, over the ratio of FLOPs": 1.0,
        "time, mcpo_lazy / dpo_padded": 0.8,
        "time, mcpo_naive / mcpo": 2.0,
    }
    assert flop_ratio(ARMS) == 1.5
    assert not found["time, mcpo / trl_best"].passed
    assert not found["time, mcpo_selective / dpo_padded_checkpointed"].passed
    assert sum(bar.passed for bar in found.values()) == 8
    slow = ARMS | {"mcpo_naive": make_row("mcpo_naive", seconds=(3.0,))}
    assert not {bar.name: bar for bar in bars(slow)}["time, mcpo_naive / mcpo"].passed


def test_mcpo_that_recomputes_is_compared_with_a_step_that_does():
    arms = ARMS | {"mcpo": make_row("mcpo", recompute="selective")}
    assert "time, mcpo / dpo_padded_checkpointed" in {bar.name for bar in bars(arms)}


def test_bars_without_their_arms_are_left_out():
    names = [bar.name for bar in bars({"mcpo": make_row("mcpo", peak_bytes=None)})]
    assert names == []


def test_tables_show_what_missed_its_bar():
    text = tables.bars_of(ARMS)
    assert "| time, mcpo / trl_best | 0.75 | <= 0.70 | **no** |" in text
    assert "| time, mcpo_naive / mcpo | 2.00 | >= 1.80 | yes |" in text
    assert "mcpo / dpo: 1.50 of the time, 1.50 of the FLOPs." in text
    one = tables.one_point(ARMS)
    assert "`trl_eager` (trl_best)" in one
    pools = tables.by_pool({POINT: ARMS})
    assert "P = 5, C = 4" in pools
    # 3 of 6 seconds, 3 of 2 operations.
    assert "0.50 (1.50)" in pools
    assert "8 of 10" in pools


def test_figures_show_several_pools_and_repeat(tmp_path):
    assert draw({POINT: ARMS}, tmp_path) == {}
    larger = dataclasses.replace(POINT, pool=5)
    found = {POINT: ARMS, larger: ARMS}
    names = [draw(found, tmp_path / each) for each in ("one", "two")]
    assert list(names[0]) == ["step-tiny-fp32.svg"]
    one, two = (tmp_path / each / "step-tiny-fp32.svg" for each in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_a_page_without_rows_says_so():
    assert report.step_page({}, {}).count("None yet.") == 4


def test_the_report_writes_the_page(tmp_path):
    append(ROWS, tmp_path / "rows.jsonl")
    path = report.write_steps(tmp_path / "rows.jsonl", tmp_path)
    assert "commits abc1234" in path.read_text()
    assert "### tiny, P = 5, C = 4, pool of 3, fp32" in path.read_text()


def test_commands_name_no_folder_of_a_machine(tmp_path):
    arguments = ["--data", str(tmp_path / "rows.jsonl"), "--results", "out/steps.jsonl"]
    shown = provenance.command("x", arguments)
    assert shown == "x --data rows.jsonl --results out/steps.jsonl"
