"""Kernels for preference optimisation with many candidates per prompt."""

from mcpo_kernels.impl import Impl, available_impls, resolve
from mcpo_kernels.linear_logprob.api import linear_logprob, sequence_logprobs
from mcpo_kernels.prefix_attention.api import prefix_attention
from mcpo_kernels.prefix_attention.layout import PrefixLayout
from mcpo_kernels.selective_recompute.api import SelectiveRecompute

__all__ = [
    "Impl",
    "PrefixLayout",
    "SelectiveRecompute",
    "available_impls",
    "linear_logprob",
    "prefix_attention",
    "resolve",
    "sequence_logprobs",
]
