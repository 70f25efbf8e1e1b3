"""Stand-ins for varlen kernels, which run on no CPU: the same signature, sequence by sequence."""

from __future__ import annotations

import inspect
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import modeling_flash_attention_utils as door

from mcpo_kernels.prefix_attention import flash

# Of the varlen function of each version: its parameters, as the sources of flash-attn 2.8.3 have
# them, in flash_attn/, hopper/ and flash_attn/cute/.
SIGNATURES = json.loads((Path(__file__).parent / "flash_signatures.json").read_text())["parameters"]


def one_sequence(query_LHD, key_KHD, value_KHD, *, scale, left, softcap, sinks_H):
    """Causal attention aligned at the end, of which ``left`` keys before a query's own are seen."""
    group = query_LHD.shape[1] // key_KHD.shape[1]
    key_HKD = key_KHD.repeat_interleave(group, 1).transpose(0, 1)
    value_HKD = value_KHD.repeat_interleave(group, 1).transpose(0, 1)
    score_HLK = scale * query_LHD.transpose(0, 1) @ key_HKD.mT
    if softcap:
        score_HLK = softcap * torch.tanh(score_HLK / softcap)
    num_queries, num_keys = len(query_LHD), len(key_KHD)
    distance_LK = torch.arange(num_keys - num_queries, num_keys)[:, None] - torch.arange(num_keys)
    hidden_LK = distance_LK < 0
    if left >= 0:
        hidden_LK |= distance_LK > left
    score_HLK = score_HLK.masked_fill(hidden_LK, -torch.inf)
    lse_HL1 = score_HLK.logsumexp(-1, keepdim=True)
    if sinks_H is not None:
        lse_HL1 = torch.logaddexp(lse_HL1, sinks_H[:, None, None])
    return ((score_HLK - lse_HL1).exp() @ value_HKD).transpose(0, 1)


def all_sequences(query, key, value, bounds_q, bounds_k, **rule):
    assert bounds_q.dtype == bounds_k.dtype == torch.int32
    assert bounds_q[0] == bounds_k[0] == 0
    assert (bounds_q[-1], bounds_k[-1]) == (len(query), len(key))
    assert query.shape[-1] == key.shape[-1] == value.shape[-1]
    parts = (
        tensor.split(bounds.diff().tolist())
        for tensor, bounds in ((query, bounds_q), (key, bounds_k), (value, bounds_k))
    )
    return torch.cat([one_sequence(*each, **rule) for each in zip(*parts, strict=True)])


def flash_stand_in(name):
    """A varlen function that takes what the real one takes and nothing else."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    signature = inspect.Signature(
        [inspect.Parameter(each, kind, default=None) for each in SIGNATURES[name]]
    )

    def kernel(*arguments, **options):
        given = signature.bind(*arguments, **options).arguments
        assert given["causal"] is True
        assert not given.get("dropout_p")
        assert given.get("deterministic") in (None, False)
        for most, bounds in (("max_seqlen_q", "cu_seqlens_q"), ("max_seqlen_k", "cu_seqlens_k")):
            if most in signature.parameters:
                assert given[most] == given[bounds].diff().max()
        return all_sequences(
            *(given[each] for each in ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k")),
            scale=given["softmax_scale"],
            left=given.get("window_size", (-1, -1))[0],
            softcap=given.get("softcap"),
            sinks_H=given.get("learnable_sink"),
        )

    kernel.__signature__ = signature
    return kernel


@pytest.fixture
def use_flash(monkeypatch):
    """Puts a stand-in where transformers looks for a version of flash-attn."""

    def use(name):
        kernel = flash_stand_in(name)
        process = door._lazy_define_process_function(kernel)
        loaded = ((None, kernel, None, None, None), (process, dict))
        monkeypatch.setattr(door, "lazy_import_flash_attention", lambda asked: loaded)
        return partial(flash.attend, name=name)

    return use
