"""Studies: what is refused before anything runs, what is skipped, what the table says."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import write_jsonl

from mcpo import study, study_report, train
from mcpo.study import Run, main, read_study, runs_of


@pytest.fixture
def file(arguments: dict[str, Any], tmp_path: Path) -> Path:
    """Two arms and two seeds of one step."""
    checks = [{"kind": "no_commas", "args": {}}, {"kind": "has_number", "args": {}}]
    items = [
        {"id": f"i{n}", "prompt": f"w{n}", "topic": f"t{n}", "checks": checks, "unseen_kind": False}
        for n in range(3)
    ]
    options = {name: str(value) for name, value in arguments.items() if name != "output_dir"}
    options |= {"max_steps": 2, "heldout_max_new_tokens": 4}
    options["heldout_prompts"] = str(write_jsonl(tmp_path / "prompts.jsonl", items))
    del options["num_train_epochs"]
    base = tmp_path / "base.yaml"
    base.write_text(yaml.safe_dump(options | {"seed": 7, "output_dir": "elsewhere"}))
    return written(
        tmp_path / "study.yaml",
        base=str(base),
        output_dir=str(tmp_path / "study"),
        seeds=[0, 1],
        arms={"mc": {"strategy": "mc"}, "max": {"strategy": "max", "learning_rate": 1e-2}},
    )


def written(path: Path, **content: Any) -> Path:
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def changed(path: Path, **content: Any) -> Path:
    return written(path, **(yaml.safe_load(path.read_text()) | content))


def in_this_process(runs: list[Run], *, jobs: int) -> list[str]:
    del jobs
    for run in runs:
        words = [w for name, value in run.options.items() for w in (f"--{name}", str(value))]
        assert train.main(words) == 0
    return []


def test_a_study_trains_each_arm_once_and_compares(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(study, "train_all", in_this_process)
    assert main([str(file)]) == 0
    shown = capsys.readouterr().out
    assert "2 arms, 2 seeds: 0 of 4 done" in shown
    runs = runs_of(read_study(str(file)))
    summaries = {}
    for run in runs:
        summary = json.loads((run.folder / "summary.json").read_text())
        assert summary["config"]["seed"] == run.seed
        summaries[run.arm, run.seed] = summary
    folder = file.parent / "study"
    result = json.loads((folder / "study.json").read_text())
    pair = [summaries["max", seed]["preference_accuracy"] for seed in (0, 1)]
    found = result["max"]["means"]["preference_accuracy"]
    assert found["mean"] == pytest.approx(sum(pair) / 2)
    assert found["stderr"] == pytest.approx(abs(pair[0] - pair[1]) / 2)
    assert result["mc"]["p_value"] is None
    other = [summaries["mc", seed]["preference_accuracy"] for seed in (0, 1)]
    gains = [ours - theirs for ours, theirs in zip(pair, other, strict=True)]
    change = result["max"]["changes"]["preference_accuracy"]
    assert change["mean"] == pytest.approx(sum(gains) / 2)
    assert change["stderr"] == pytest.approx(abs(gains[0] - gains[1]) / 2)
    assert 0 < result["max"]["p_value"] <= 1
    assert (folder / "table.md").read_text() in shown
    assert "| max |" in shown
    assert (folder / "study.png").stat().st_size > 1000

    assert main([str(file)]) == 0
    # Another life trains nothing that is done.
    assert "4 of 4 done" in capsys.readouterr().out
    assert main([str(changed(file, options={"beta": 0.2}))]) == 2
    assert "must hold a run of arm 'mc', and differs in beta" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arms": {"a": {"strategy": "mx"}}}, "arm 'a': strategy must be one of mc, max, min"),
        (
            {"arms": {"a": {"loss_type": "dpoo"}}},
            "arm 'a': loss_type must be one of mcpo, mcpo_unbiased",
        ),
        ({"arms": {"a": {"train_data": "x.jsonl"}}}, "arm 'a': there is no file x.jsonl"),
        ({"arms": {"a": {"learning_rat": 1}}}, "arm 'a': unknown option 'learning_rat' in"),
        ({"arms": {"a": {"seed": 3}}}, "arm 'a' must leave seed to the study"),
        ({"arms": {"a": {}, "b": None}}, "arms must differ, and 'a' and 'b' are the same"),
        ({"arms": {"a/b": {}}}, "an arm's name must do as a folder's, got 'a/b'"),
        ({"arms": []}, "must map arms, and any of base, output_dir, seeds"),
        ({"arm": {}}, "must map arms, and any of base, output_dir, seeds"),
        ({"baseline": "c"}, "baseline must be one of the arms ['mc', 'max'], got 'c'"),
        ({"seeds": [1, 1]}, "seeds must be different whole numbers, got [1, 1]"),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else "",
)
def test_a_bad_arm_stops_the_study_before_it_starts(
    file: Path,
    change: dict[str, Any],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(study, "_train", lambda run, threads: pytest.fail("it started"))
    assert main([str(changed(file, **change))]) == 2
    assert message in capsys.readouterr().err


def test_a_study_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["absent.yaml"]) == 2
    assert "a study must be a YAML file, got 'absent.yaml'" in capsys.readouterr().err


def test_a_failed_run_is_named_and_the_others_go_on(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begun = []

    def fail_first(run: Run, threads: int) -> str | None:
        begun.append(threads)
        return "mc, seed 0 (log.txt)" if len(begun) == 1 else None

    monkeypatch.setattr(study, "_train", fail_first)
    assert main([str(file), "--jobs", "1"]) == 3
    assert "1 runs failed: mc, seed 0 (log.txt)" in capsys.readouterr().err
    assert len(begun) == 4


def test_errors_over_seeds() -> None:
    one, three = study_report.over_seeds([2.0]), study_report.over_seeds([1.0, 2.0, 6.0])
    assert math.isnan(one.stderr)
    assert three.mean == 3.0
    assert three.stderr == pytest.approx(math.sqrt((4 + 1 + 9) / 2 / 3))


@pytest.mark.slow
def test_a_study_in_processes_of_its_own(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(file), "--jobs", "2"]) == 0
    shown = capsys.readouterr().out
    assert shown.count(": done") == 4
    assert (file.parent / "study" / "mc" / "seed1" / "log.txt").stat().st_size > 100
