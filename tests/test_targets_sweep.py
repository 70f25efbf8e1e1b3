"""Every Triton kernel, compiled for every target without a GPU, as it would be launched."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from mcpo_kernels.targets.cases import DTYPES
from mcpo_kernels.targets.devices import TARGETS

KEYS = {
    "kernel",
    "target",
    "config",
    "registers",
    "spills",
    "shared_bytes",
    "shared_limit",
    "tensor_core_ops",
    "async_copies",
    "ok",
}
# Kernels without a matrix product.
MOVERS = {"merge_kernel", "select_kernel", "gather_kernel", "scatter_kernel"}


def kernels() -> set[str]:
    """Functions under ``triton.jit`` that are launched: those named so."""
    found: set[str] = set()
    for path in (ROOT / "mcpo_kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                found |= {node.name for mark in node.decorator_list if "jit" in ast.unparse(mark)}
    return found


def environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return kept | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"} | more


def sweep(*arguments: object, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mcpo_kernels.targets", *map(str, arguments)],
        cwd=ROOT,
        env=environment(**more),
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Rows of the representative subset."""
    path = tmp_path_factory.mktemp("targets") / "rows.jsonl"
    done = sweep("--quick", "--json", path)
    assert done.returncode in (0, 1), done.stderr
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_kernel_is_compiled_for_every_target(quick):
    assert {(row["kernel"], row["target"]) for row in quick} == {
        (kernel, target) for kernel in kernels() for target in TARGETS
    }


def test_every_row_passes(quick):
    bad = [row for row in quick if not row["ok"]]
    assert [(row["kernel"], row["target"], row["config"], row["why"]) for row in bad] == []


def test_nothing_spills_and_everything_fits(quick):
    for row in quick:
        assert row.keys() >= KEYS
        assert row["spills"] == row["stack"] == 0, row
        assert row["shared_bytes"] <= row["shared_limit"], row
        assert row["blocks"] >= 1, row


def test_products_run_on_tensor_cores_from_pipelined_wide_loads(quick):
    kinds = {"sm_80": "mma", "sm_89": "mma", "sm_90": "wgmma", "sm_100": "tcgen05"}
    for row in quick:
        if row["kernel"] in MOVERS:
            continue
        assert row["tensor_core_kind"] == kinds.get(row["target"], "mfma"), row
        assert row["tensor_core_ops"] > 0, row
        assert row["pipelined"] is True, row
        assert max(map(int, row["loads"])) >= 16, row
        assert row["async_copies"] > 0, row


def test_what_spills_fails_and_says_so():
    script = textwrap.dedent("""
        import json
        from mcpo_kernels.linear_logprob.triton.tiles import Tile
        from mcpo_kernels.targets import cases
        from mcpo_kernels.targets.devices import TARGETS
        from mcpo_kernels.targets.verdict import row_of
        tile = Tile(128, 256, 32, 4, 3, 8)
        (case,) = cases.launches(
            TARGETS["sm_80"], "bf16", "plain", cases.USUAL, tile=("forward", tile)
        )
        row = row_of(case)
        print(json.dumps([row.ok, row.spills, row.why]))
    """)
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    ok, spills, why = json.loads(done.stdout)
    assert not ok
    assert spills > 0
    assert f"spills {spills} bytes" in why


def test_an_unknown_kernel_is_refused():
    done = sweep("--quick", "--target", "sm_80", "--kernel", "forwrd")
    assert done.returncode == 2
    assert "--kernel must name a kernel, such as forward_kernel" in done.stderr


def test_interpreted_kernels_are_refused():
    done = sweep("--quick", TRITON_INTERPRET="1")
    assert done.returncode != 0
    assert "TRITON_INTERPRET=1 has them interpreted; unset it" in done.stderr


def group_ends(group: int, *, within: float) -> bool:
    """Whether every process of a group is gone in time."""
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def test_ctrl_c_ends_it_cleanly(tmp_path: Path):
    rows = tmp_path / "rows.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-m", "mcpo_kernels.targets", "--quick", "--fresh", "--json", str(rows)],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell that runs tests in the background makes its children deaf to Ctrl-C.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while not rows.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    # As a terminal does it: to every process of the group.
    os.killpg(process.pid, signal.SIGINT)
    output, errors = process.communicate(timeout=30)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert "stopped after" in errors
    assert " pass" in output
    for line in rows.read_text().splitlines():
        json.loads(line)
    assert group_ends(process.pid, within=10)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target", TARGETS)
def test_every_configuration_passes(target, dtype):
    """All shapes and tiles; half an hour in all on two quiet cores, and no time the second time."""
    done = sweep("--target", target, "--dtype", dtype)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_odd_sizes_compile(target):
    """Loads of odd rows are narrow and spill, but sizes of 1, which are constants, are no error."""
    script = textwrap.dedent(f"""
        import json
        from mcpo_kernels.targets.cases import launches
        from mcpo_kernels.targets.devices import TARGETS
        from mcpo_kernels.targets.verdict import row_of
        from mcpo_kernels.testing import Shape
        rows = [
            row_of(case)
            for shape in (Shape(1, 1, 1), Shape(33, 17, 130))
            for case in launches(TARGETS[{target!r}], "bf16", "bias, softcap, filter", shape)
        ]
        print(json.dumps([[row.kernel, row.registers, row.why] for row in rows]))
    """)
    command = [sys.executable, "-c", script]
    done = subprocess.run(
        command, env=environment(), cwd=ROOT, capture_output=True, text=True, check=True
    )
    rows = json.loads(done.stdout)
    assert {kernel for kernel, *_ in rows} == kernels()
    assert [row for row in rows if row[1] is None] == []
