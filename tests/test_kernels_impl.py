from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch

import mcpo_kernels
from mcpo_kernels import Impl, available_impls, linear_logprob, resolve

CPU = torch.device("cpu")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_auto_says_what_it_chose_and_why(dtype):
    impl, reason = resolve("auto", CPU, dtype)
    assert impl is Impl.CHUNKED
    assert reason.startswith("auto: ")


@pytest.mark.parametrize("name", [impl.value for impl in Impl if impl is not Impl.AUTO])
def test_an_explicit_choice_never_falls_back(name):
    if available_impls()[Impl(name)].available:
        assert resolve(name, CPU, torch.float32) == (Impl(name), f"asked for: {name}")
    else:
        cannot = re.escape(f"impl='{name}' cannot run here: ")
        with pytest.raises(RuntimeError, match=cannot + r".*use one of 'reference', 'chunked', or"):
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
