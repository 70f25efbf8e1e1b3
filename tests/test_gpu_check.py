"""The command that checks a GPU, without one: its refusals, its parts, its verdict."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT

from benchmarks import gpu_check, provenance, report, rows, tables
from benchmarks.gpu_check import FAIL, PART, PASS, Part
from benchmarks.step.__main__ import _names, _parser, _point
from benchmarks.watched import Ended
from mcpo_kernels.linear_logprob.triton import entry

ENDED = Ended(passed=True, stopped=False, last="300 passed", failures=(), seconds=1.0)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(gpu_check, "FOLDER", tmp_path)
    return tmp_path


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is made up."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (70 * 2**30, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(provenance, "gpu_and_driver", lambda: "NVIDIA H100, driver 580, runtime 13")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: type("P", (), {"major": 9}))


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], float, dict[str, str]]]:
    """Commands that would have run; each ends well."""
    seen: list[tuple[list[str], float, dict[str, str]]] = []

    def watch(command: list[str], limit: float, log: Path, environment: dict[str, str]) -> Ended:
        seen.append((command, limit, environment))
        return ENDED

    monkeypatch.setattr(gpu_check, "watch", watch)
    return seen


def test_without_a_gpu_it_stops_with_one_line(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main([]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert len(output.err.splitlines()) == 1
    assert "gpu-check needs a CUDA or ROCm device, and torch" in output.err


def test_interpreted_kernels_are_refused(gpu, capsys, monkeypatch):
    monkeypatch.setattr(entry, "INTERPRETED", True)
    assert gpu_check.main([]) == 2
    assert "TRITON_INTERPRET has them interpreted; unset it" in capsys.readouterr().err


def test_the_parts_together_take_less_than_a_quarter_of_an_hour():
    limits = (gpu_check.TEST_LIMIT, gpu_check.HEAD_LIMIT, gpu_check.STEP_LIMIT)
    # A minute for the environment, figures and processes that need to be asked twice to end.
    assert sum(limits) + 60 <= 15 * 60


def test_the_environment_is_named_and_kept(folder, gpu, capsys):
    part = gpu_check.environment()
    assert part.state == PASS
    output = capsys.readouterr().out
    assert "GPU            NVIDIA H100, driver 580, runtime 13" in output
    assert "peer cce_kernel" in output
    assert (folder / "environment.txt").read_text() == output


def test_tests_run_the_files_that_are_there_and_do_not_tune(folder, watched, monkeypatch):
    monkeypatch.setenv("MCPO_TUNE", "1")
    assert gpu_check.tests().state == PASS
    ((command, limit, environment),) = watched
    files = [ROOT / word for word in command if word.endswith(".py")]
    assert sorted(files) == sorted((ROOT / "tests").glob("test_gpu_[dh]*.py"))
    marked = [path for path in (ROOT / "tests").glob("*.py") if "mark.gpu\n" in path.read_text()]
    assert sorted(files) == sorted(marked)
    assert limit == gpu_check.TEST_LIMIT
    assert "MCPO_TUNE" not in environment


@pytest.mark.parametrize(
    ("measured", "ended", "state"),
    [(2, {}, PASS), (0, {}, FAIL), (2, {"stopped": True}, PART), (2, {}, FAIL)],
)
def test_what_was_measured_of_the_head_counts(folder, monkeypatch, measured, ended, state):
    kept = [["old"], ["old", *["new"] * measured]]
    monkeypatch.setattr(rows, "read", lambda _: kept.pop(0))
    monkeypatch.setattr(rows, "latest", lambda found: found)
    monkeypatch.setattr(report, "write", lambda *_: folder / "page.md")
    monkeypatch.setattr(tables, "ours_against_the_best", str)
    passed = state == PASS or not measured
    result = Ended(passed=passed, stopped=bool(ended), last="end", failures=(), seconds=1.0)
    monkeypatch.setattr(gpu_check, "watch", lambda *_: result)
    part = gpu_check.head()
    assert part.state == state
    assert part.text.startswith(f"{measured} rows")


def test_a_step_is_told_by_its_time_and_its_bars(folder, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4")
    seen: list[Any] = []

    def watch(command: list[str], limit: float, log: Path, environment: dict[str, str]) -> Ended:
        seen.append((command, environment))
        answer: dict[str, Any] = {
            "seconds": {"mcpo": 0.0123},
            "ratios": {"seconds": {"trl_best": 0.5, "dpo": None}},
            "bars": [{"passed": True}, {"passed": False}],
        }
        Path(command[command.index("--json") + 1]).write_text(json.dumps(answer))
        return ENDED

    monkeypatch.setattr(gpu_check, "watch", watch)
    part = gpu_check.step()
    assert part.state == PASS
    assert part.text == "mcpo 12.3 ms, 0.50 of trl_best; 1 of 2 bars kept"
    ((command, environment),) = seen
    assert environment["CUDA_VISIBLE_DEVICES"] == "3"
    # The options are those that the benchmark has.
    options = _parser().parse_args(command[command.index("benchmarks.step") + 1 :])
    assert _point(options).device == "cuda"
    assert "trl_default" in _names(options)


def test_without_trl_a_step_is_measured_beside_the_rest(folder, watched, monkeypatch):
    monkeypatch.setattr(gpu_check, "_installed", lambda _: False)
    (folder / "step.json").write_text("of an earlier run")
    part = gpu_check.step()
    # What it did not write says nothing of it.
    assert part.text == "300 passed"
    command = watched[0][0]
    assert "trl" not in command[command.index("--arms") + 1]


def test_a_part_that_raises_has_failed_and_says_why():
    def head() -> Part:
        raise KeyError("driver")

    part = gpu_check.guarded(head)
    assert (part.name, part.state, part.text) == ("head", FAIL, "KeyError: 'driver'")


def test_the_verdict_has_a_word_for_each_part_and_one_for_all():
    good = Part(name="tests", state=PASS, text="300 passed", seconds=12.0)
    some = Part(name="head", state=PART, text="3 rows", seconds=99.0)
    lines = tuple(f"FAILED tests/test_gpu_head.py::test_{number}" for number in range(12))
    bad = Part(name="tests", state=FAIL, text="12 failed", seconds=99.0, failures=lines)
    assert gpu_check.verdict([good]).splitlines()[-1] == "PASS: the kernels work on this GPU"
    assert gpu_check.verdict([good, some]).splitlines()[-1].startswith("PASS: the kernels work")
    assert "no time to measure everything" in gpu_check.verdict([some])
    text = gpu_check.verdict([good, bad]).splitlines()
    assert text[0].startswith("PASS  tests")
    assert text[1].startswith("FAIL  tests")
    assert text[2] == "      FAILED tests/test_gpu_head.py::test_0"
    assert text[-2] == "      and 2 more"
    assert text[-1].startswith("FAIL: something failed; logs are in ")


def test_a_whole_check(folder, gpu, watched, capsys):
    assert gpu_check.main(["--skip_benchmark"]) == 0
    assert len(watched) == 1
    # Benchmarks that measured nothing have failed, whatever their exit status.
    assert gpu_check.main([]) == 1
    assert len(watched) == 4
    output = capsys.readouterr().out
    assert "PASS: the kernels work on this GPU" in output
    assert "FAIL  head" in output
    assert (folder / "verdict.txt").read_text().splitlines()[-1].startswith("FAIL")


def collected(*arguments: str) -> str:
    command = [sys.executable, *arguments, "--collect-only", "-q"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_pytest_takes_the_options_of_the_command():
    assert "torch.bfloat16-plain" in collected(*gpu_check.TESTS)
    assert "triton" in collected(*gpu_check.HEAD)


@pytest.mark.slow
def test_the_tests_for_a_gpu_pass_in_the_interpreter():
    """But for what it multiplies wrongly or not in minutes, and what only a device has."""
    left_out = "bfloat16 or large or 2048 or 50257 or N1043 or float16-all or precision or float64"
    done = subprocess.run(
        [sys.executable, *gpu_check.TESTS[:-1], "-k", f"not ({left_out})"],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
