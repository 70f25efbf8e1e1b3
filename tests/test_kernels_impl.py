from __future__ import annotations

import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import FUSED

import mcpo_kernels
from mcpo_kernels import Impl, available_impls, linear_logprob, resolve
from mcpo_kernels.linear_logprob import cpu
from mcpo_kernels.linear_logprob.triton import entry, launch

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_auto_says_what_it_chose_and_why(dtype):
    impl, reason = resolve("auto", CPU, dtype)
    assert impl is (Impl.CPU if cpu.AVAILABLE else Impl.CHUNKED)
    assert reason.startswith("auto: ")
    assert str(dtype) in reason


def test_auto_without_the_extension_is_portable_and_says_why(monkeypatch):
    monkeypatch.setattr(cpu, "AVAILABLE", False)
    monkeypatch.setattr(cpu, "REASON", "no compiler was there")
    impl, reason = resolve("auto", CPU, torch.float32)
    assert impl is Impl.CHUNKED
    assert reason.endswith("no compiler was there")
    with pytest.raises(
        RuntimeError, match="impl='cpu' cannot run here: no compiler was there; use"
    ):
        resolve("cpu", CPU, torch.float32)


def test_a_missing_extension_is_named_with_its_remedy():
    code = "import sys; sys.modules['mcpo_kernels._C'] = None; import mcpo_kernels as k; "
    code += "print(k.available_impls()[k.Impl.CPU].reason)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "the C++ extension cannot be loaded" in done.stdout
    assert "--no-build-isolation" in done.stdout


@pytest.mark.parametrize("impl", FUSED[1:])
def test_the_compiled_kernel_takes_no_tensors_of_other_devices(impl):
    with pytest.raises(RuntimeError, match=r"impl='cpu' cannot run here: .* got meta; use"):
        resolve(impl, torch.device("meta"), torch.float32)


@pytest.fixture
def pretend_device(monkeypatch):
    """A CUDA device that torch seems to see, of the capability given."""

    def pretend(major, minor=0):
        monkeypatch.setattr(entry, "INSTALLED", True)
        monkeypatch.setattr(entry, "INTERPRETED", False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        properties = SimpleNamespace(major=major, minor=minor)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (major, minor))

    return pretend


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_auto_takes_triton_on_a_device_for_all_but_float64(dtype, pretend_device):
    pretend_device(9)
    impl, reason = resolve("auto", CUDA, dtype)
    assert impl is (Impl.CHUNKED if dtype == torch.float64 else Impl.TRITON)
    assert reason.startswith("auto: ")
    assert str(dtype) in reason


def test_auto_on_a_device_without_triton_is_portable_and_says_why(monkeypatch, pretend_device):
    pretend_device(9)
    monkeypatch.setattr(entry, "INSTALLED", False)
    impl, reason = resolve("auto", CUDA, torch.bfloat16)
    assert impl is Impl.CHUNKED
    assert "triton is not installed; python -m pip install triton" in reason
    with pytest.raises(RuntimeError, match="impl='triton' cannot run here: triton is not inst"):
        resolve("triton", CUDA, torch.bfloat16)


def test_triton_without_a_device_says_so(monkeypatch):
    monkeypatch.setattr(entry, "INSTALLED", True)
    monkeypatch.setattr(entry, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="cannot run here: torch sees no CUDA or ROCm device"):
        resolve("triton", CPU, torch.float32)


def test_triton_refuses_what_it_cannot_take(pretend_device):
    pretend_device(9)
    with pytest.raises(RuntimeError, match="tensors on a CUDA or ROCm device, got cpu; use 'chun"):
        resolve("triton", CPU, torch.float32)
    with pytest.raises(RuntimeError, match=r"it takes .* or float32, got torch.float64; use 'chu"):
        resolve("triton", CUDA, torch.float64)
    pretend_device(7)
    with pytest.raises(RuntimeError, match=r"needs compute capability 8.0 or more, got 7.x; use"):
        resolve("triton", CUDA, torch.float16)
    assert resolve("auto", CUDA, torch.float16).impl is Impl.CHUNKED


def test_the_interpreter_takes_tensors_on_the_cpu_and_no_bfloat16(monkeypatch):
    monkeypatch.setattr(entry, "INSTALLED", True)
    monkeypatch.setattr(entry, "INTERPRETED", True)
    assert resolve("triton", CPU, torch.float16).impl is Impl.TRITON
    assert "for tests alone" in available_impls()[Impl.TRITON].reason
    with pytest.raises(RuntimeError, match=r"under TRITON_INTERPRET it takes .* got cuda"):
        resolve("triton", CUDA, torch.float32)
    with pytest.raises(RuntimeError, match="interpreter multiplies the bits of bfloat16"):
        resolve("triton", CPU, torch.bfloat16)


FAMILIES = {(8, 0): "sm80", (8, 9): "sm89", (9, 0): "sm90", (10, 0): "sm100", (12, 0): "sm89"}


@pytest.mark.parametrize(("capability", "family"), FAMILIES.items(), ids=str)
def test_a_device_has_a_family_of_tiles(capability, family, pretend_device):
    pretend_device(*capability)
    assert launch.family_of(CUDA) == family


PRECISIONS = {"highest": "ieee", "high": "tf32x3", "medium": "tf32"}


@pytest.mark.parametrize(("wanted", "expected"), PRECISIONS.items(), ids=str)
def test_float32_products_follow_torch(wanted, expected):
    torch.set_float32_matmul_precision(wanted)
    try:
        assert launch.precision_of("sm90") == expected
        assert launch.precision_of("gfx942") == "ieee"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_float32_products_follow_the_newer_words_of_torch_too():
    """After which torch refuses to be asked in the old ones."""
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        with pytest.raises(RuntimeError, match="mix of the legacy and new APIs"):
            torch.get_float32_matmul_precision()
        assert launch.precision_of("sm90") == "tf32x3"
    finally:
        torch.backends.cuda.matmul.fp32_precision = "ieee"
    assert launch.precision_of("sm90") == "ieee"


@pytest.mark.parametrize("name", [impl.value for impl in Impl if impl is not Impl.AUTO])
def test_an_explicit_choice_never_falls_back(name):
    if available_impls()[Impl(name)].available:
        assert resolve(name, CPU, torch.float32) == (Impl(name), f"asked for: {name}")
    else:
        cannot = re.escape(f"impl='{name}' cannot run here: ")
        with pytest.raises(RuntimeError, match=cannot + r".*use one of 'reference', 'chunked',"):
            resolve(name, CPU, torch.float32)


def test_unknown_names_are_answered_with_the_known_ones():
    with pytest.raises(ValueError, match=r"impl must be one of 'auto', 'reference'.*got 'fast'"):
        linear_logprob(torch.zeros(1, 1), torch.zeros(1, 1), torch.tensor([0]), impl="fast")


def test_every_impl_is_either_available_or_says_why_not():
    assert set(available_impls()) == set(Impl) - {Impl.AUTO}
    assert all(state.reason for state in available_impls().values())


def test_public_names():
    assert mcpo_kernels.__all__ == [
        "Impl",
        "PrefixLayout",
        "SelectiveRecompute",
        "available_impls",
        "linear_logprob",
        "prefix_attention",
        "resolve",
        "sequence_logprobs",
    ]
    assert all(hasattr(mcpo_kernels, name) for name in mcpo_kernels.__all__)


def test_importing_the_package_imports_torch_alone():
    heavy = "{'triton', 'transformers', 'mcpo'}"
    code = f"import sys, mcpo_kernels; assert not {heavy} & set(sys.modules), {heavy}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
