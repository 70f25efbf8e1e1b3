"""The command that checks a GPU, without one: its refusal, its verdict, how it watches pytest."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check, provenance
from benchmarks.gpu_check import Part


def test_without_a_gpu_it_stops_with_one_line(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main([]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert len(output.err.splitlines()) == 1
    assert "gpu-check needs a CUDA or ROCm device, and torch" in output.err


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(gpu_check, "FOLDER", tmp_path)
    return tmp_path


def test_pytest_is_shown_and_kept(folder, capsys):
    part = gpu_check.run_pytest("tests", ("tests/test_losses.py", "-q", "-k", "dpo"), 60)
    assert part.passed
    assert "passed" in part.text
    assert "passed" in capsys.readouterr().out
    assert "passed" in (folder / "tests.log").read_text()


def test_a_failing_part_is_told(folder, tmp_path):
    bad = tmp_path / "test_bad.py"
    bad.write_text("def test_bad():\n    assert False\n")
    part = gpu_check.run_pytest("tests", (str(bad), "-q", "-c", "/dev/null"), 60)
    assert not part.passed
    assert "1 failed" in part.text


def test_a_part_that_takes_too_long_has_failed(folder, tmp_path):
    slow = tmp_path / "test_slow.py"
    slow.write_text(
        "import time\n"
        "def test_slow():\n"
        "    for _ in range(600):\n"
        "        print('still here', flush=True)\n"
        "        time.sleep(0.1)\n"
    )
    part = gpu_check.run_pytest("tests", (str(slow), "-q", "-s", "-c", "/dev/null"), 2)
    assert not part.passed
    assert part.text.startswith("stopped after 2 s")
    assert part.seconds < 30


def test_the_verdict_has_a_word_for_each_part_and_one_for_all():
    good = Part(name="tests", passed=True, text="300 passed", seconds=12.0)
    bad = Part(name="benchmark", passed=False, text="3 rows; 1 failed", seconds=99.0)
    assert gpu_check.verdict([good]).splitlines()[-1] == "PASS: the kernels work on this GPU"
    lines = gpu_check.verdict([good, bad]).splitlines()
    assert lines[0].startswith("PASS  tests")
    assert lines[1].startswith("FAIL  benchmark")
    assert lines[2].startswith("FAIL: something failed; logs are in ")


def test_a_whole_check(folder, capsys, monkeypatch):
    """Every part but pytest itself, on a GPU that is made up."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (70 * 2**30, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(provenance, "gpu_and_driver", lambda: "NVIDIA H100, driver 580, runtime 13")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: type("P", (), {"major": 9}))
    ran: list[str] = []

    def run_pytest(name: str, arguments: object, limit: float) -> Part:
        ran.append(name)
        return Part(name=name, passed=True, text="passed", seconds=1.0)

    monkeypatch.setattr(gpu_check, "run_pytest", run_pytest)
    assert gpu_check.main(["--skip_benchmark"]) == 0
    assert ran == ["tests"]
    # A benchmark that measured nothing has failed, whatever pytest says.
    assert gpu_check.main([]) == 1
    output = capsys.readouterr().out
    assert "GPU            NVIDIA H100, driver 580, runtime 13" in output
    assert "peer cce_kernel" in output
    assert "PASS: the kernels work on this GPU" in output
    assert "FAIL  benchmark" in output
    assert (folder / "verdict.txt").read_text().splitlines()[-1].startswith("FAIL")
