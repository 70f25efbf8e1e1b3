from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch
from conftest import FUSED

import mcpo_kernels
from mcpo_kernels import Impl, available_impls, linear_logprob, resolve
from mcpo_kernels.linear_logprob import cpu

CPU = torch.device("cpu")
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
