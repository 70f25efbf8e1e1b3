"""The compiled head as other processors run it, and the package where it cannot be compiled."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import mcpo_kernels
from mcpo_kernels.linear_logprob import cpu
from mcpo_kernels.testing import SHAPES, Shape, assert_within_budget, evaluate, make_inputs

ROOT = Path(__file__).parents[1]
# What each needs, as torch names it; the widest first.
FEATURES = {
    "avx512": ("avx2", "fma3", "avx512_f", "avx512_bw", "avx512_dq", "avx512_vl"),
    "avx2": ("avx2", "fma3"),
    "baseline": (),
}
PROCESSOR = torch.cpu.get_capabilities()
RUNNABLE = [
    name for name, needs in FEATURES.items() if all(PROCESSOR.get(need, False) for need in needs)
]
needs_build = pytest.mark.skipif(not cpu.AVAILABLE, reason=cpu.REASON)
needs_avx2 = pytest.mark.skipif("avx2" not in RUNNABLE, reason="this processor has no AVX2")

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
HEADS: tuple[dict[str, Any], ...] = ({}, {"bias": True, "softcap": 30.0, "scale": 2.0})
# Several parts and slabs of the vocabulary, several tiles of rows, an odd hidden size.
LARGE = Shape(301, 131, 1291)


def grid(*portables: bool) -> None:
    """Run the grid of the kernel tests in this process; print with what, and the failures."""
    failures: list[str] = []
    for portable in portables:
        cpu.PORTABLE = portable
        for dtype, shape, head in itertools.product(DTYPES, (*SHAPES, LARGE), HEADS):
            try:
                assert_within_budget("cpu", make_inputs(shape, dtype, **head))
            except AssertionError as error:
                failures.append(f"portable={portable} {dtype} {shape} {head}: {error}")
        for dtype in DTYPES:
            wrong = [*non_finite(dtype), *cached(dtype)]
            failures += [f"portable={portable} {dtype}: {what}" for what in wrong]
    print(json.dumps({"reason": cpu.REASON, "failures": failures}))


def non_finite(dtype: torch.dtype) -> list[str]:
    """What is wrong where logits are NaN or minus infinity."""
    wrong: list[str] = []
    case = make_inputs(LARGE, dtype, bias=True)
    assert case.bias is not None
    case.bias[:900] = -torch.inf
    case.targets.clamp_(min=900)
    clean = evaluate("cpu", case)
    if not all(result is not None and result.isfinite().all() for result in clean):
        wrong.append("a bias of minus infinity is not finite")
    unseen = case.grad == 0
    case.hidden[unseen] = torch.nan
    poisoned = evaluate("cpu", case)
    if not torch.equal(poisoned.logp.isnan(), unseen):
        wrong.append("NaN in is not NaN out")
    for ours, expected in zip(poisoned[1:], clean[1:], strict=True):
        if ours is None or expected is None or not torch.equal(ours, expected):
            wrong.append("a poisoned row without gradient spread")
    return wrong


def cached(dtype: torch.dtype) -> list[str]:
    """What is wrong where the backward finds logits of the forward again."""
    case = make_inputs(LARGE, dtype, softcap=20.0)
    plain, kept = evaluate("cpu", case), evaluate("cpu", case, cache_mb=1.0)
    same = all(torch.equal(*pair) for pair in zip(plain[:3], kept[:3], strict=True))
    return [] if same else ["kept logits changed a bit"]


def python(
    code: str, package: Path = Path(mcpo_kernels.__file__), **variables: str
) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter that finds the package where this one found it."""
    paths = [package.parents[1], Path(torch.__file__).parents[1]]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))} | variables
    return subprocess.run(
        # -S: no finder of an editable install, which would find the library of another folder.
        [sys.executable, "-S", "-c", code],
        cwd=Path(__file__).parent,
        env=environment,
        capture_output=True,
        text=True,
    )


# Products of oneDNN for AVX-512 without bf16, and for AVX2, as on processors that have no more; the
# plainest loops with the products that there are, and as on a processor without AVX2.
AVX512 = {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}
AVX2 = {"MCPO_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
BASELINE = {"MCPO_CPU_CAPABILITY": "baseline"}
SSE41 = {"ONEDNN_MAX_CPU_ISA": "SSE41", "ATEN_CPU_CAPABILITY": "default"} | BASELINE
BUILDS = {
    "avx512": (AVX512, (False,), f"{RUNNABLE[0]} loops, oneDNN products, bf16 as float32"),
    "avx2": (AVX2, (False, True), "avx2 loops, oneDNN products, bf16 as float32"),
    "baseline": (BASELINE, (False,), "baseline loops, oneDNN products, "),
    "sse41": (SSE41, (False,), "baseline loops, portable products, bf16 as float32"),
}


@needs_build
@needs_avx2
@pytest.mark.parametrize(("variables", "portables", "reason"), BUILDS.values(), ids=BUILDS)
def test_grid_within_budget(variables, portables, reason):
    done = python(f"import test_kernels_builds as builds; builds.grid(*{portables})", **variables)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["reason"].startswith(f"compiled kernel: {reason}")
    assert found["failures"] == []


@needs_build
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_of_our_own_where_onednn_is_switched_off(dtype, monkeypatch):
    case = make_inputs(LARGE, dtype)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    switched_off = evaluate("cpu", case)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", True)
    monkeypatch.setattr(cpu, "PORTABLE", True)
    for result, own in zip(switched_off[:3], evaluate("cpu", case)[:3], strict=True):
        assert torch.equal(result, own)


REASON = "import mcpo_kernels as k; print(k.available_impls()[k.Impl.CPU].reason)"


@needs_build
@pytest.mark.parametrize("name", ["", "avx512"])
def test_the_variable_sets_no_instructions_that_the_processor_lacks(name):
    done = python(REASON, MCPO_CPU_CAPABILITY=name)
    if name and name not in RUNNABLE:
        assert "MCPO_CPU_CAPABILITY must name loops that this processor runs" in done.stderr
    else:
        assert f"compiled kernel: {name or RUNNABLE[0]} loops" in done.stdout, done.stderr


@needs_build
def test_an_unknown_instruction_set_is_refused_with_the_known_ones():
    done = python(REASON, MCPO_CPU_CAPABILITY="sse9")
    # An exception, and no signal.
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == (
        "RuntimeError: MCPO_CPU_CAPABILITY must name loops that this processor runs "
        f"({', '.join(RUNNABLE)}), got 'sse9'; unset it for the widest"
    )


def test_without_a_compiler_the_package_works_and_says_why(tmp_path):
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    package = Path(mcpo_kernels.__file__).parent
    no_build = shutil.ignore_patterns("_C.*", "__pycache__")
    shutil.copytree(package, tmp_path / "mcpo_kernels", ignore=no_build)
    missing = str(tmp_path / "no-compiler")
    build = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=tmp_path,
        env=os.environ | {"CC": missing, "CXX": missing},
        capture_output=True,
        text=True,
    )
    assert build.returncode == 0, build.stderr
    assert "mcpo_kernels: installing without the C++ extension: " in build.stderr
    assert not list((tmp_path / "mcpo_kernels").glob("_C.*"))
    code = (
        "import torch, mcpo_kernels as k; hidden = torch.ones(1, 1, device='cpu');"
        "print(*k.resolve('auto', hidden.device, hidden.dtype));"
        "print(k.linear_logprob(hidden, hidden, torch.tensor([0])).item())"
    )
    done = python(code, tmp_path / "mcpo_kernels" / "__init__.py")
    assert done.returncode == 0, done.stderr
    choice, value = done.stdout.splitlines()
    assert choice.startswith("Impl.CHUNKED auto: portable torch for torch.float32; ")
    assert "the C++ extension cannot be loaded" in choice
    assert float(value) == 0.0
