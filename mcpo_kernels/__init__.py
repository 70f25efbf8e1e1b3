"""Kernels for preference optimisation with many candidates per prompt."""

from mcpo_kernels.impl import Impl, available_impls, resolve
from mcpo_kernels.linear_logprob.api import linear_logprob, sequence_logprobs

__all__ = [
    "Impl",
    "available_impls",
    "linear_logprob",
    "resolve",
    "sequence_logprobs",
]
