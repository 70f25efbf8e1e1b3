from __future__ import annotations

import pytest
import torch
from conftest import FUSED

from mcpo_kernels import linear_logprob, sequence_logprobs

HIDDEN = torch.zeros(4, 3)
WEIGHT = torch.zeros(5, 3)
TARGETS = torch.tensor([0, 1, 2, 4])
SEQ_IDS = torch.tensor([0, 0, 1, 1])


def on_meta(tensor):
    return tensor.to("meta")


class Sharded(torch.Tensor):
    """Stands in for a DTensor, which is known by its placements."""

    placements = ("Shard(0)",)


BAD_ARGUMENTS = {
    "hidden 3-D": ({"hidden": HIDDEN[None]}, ValueError, r"hidden must be \[N, D\] .* scored rows"),
    "hidden of another D": ({"hidden": HIDDEN[:, :2]}, ValueError, r"got \[4, 2\] and \[5, 3\]"),
    "hidden integers": ({"hidden": HIDDEN.long()}, TypeError, "hidden must be bfloat16.*int64"),
    "weight dtype": (
        {"weight": WEIGHT.bfloat16()},
        TypeError,
        r"weight must have the dtype of hidden, got torch.bfloat16 .*\.to\(hidden\.dtype\)",
    ),
    "weight device": (
        {"weight": on_meta(WEIGHT)},
        ValueError,
        r"weight must be on the device of hidden, got meta and cpu; move",
    ),
    "weight partitioned": (
        {"weight": torch.zeros(0)},
        ValueError,
        r"weight must have elements, got shape \[0\].*inside the forward of the module",
    ),
    "weight a DTensor": (
        {"weight": WEIGHT.as_subclass(Sharded)},
        TypeError,
        "plain tensor, got a DTensor.*inside the forward of the module",
    ),
    "targets shape": ({"targets": TARGETS[:3]}, ValueError, r"targets must be \[N\].*N = 4"),
    "targets dtype": ({"targets": TARGETS.int()}, TypeError, r"int64, got torch.int32.*\.long"),
    "targets device": (
        {"targets": on_meta(TARGETS)},
        ValueError,
        "targets must be on the device of hidden",
    ),
    "targets too large": (
        {"targets": TARGETS + 1},
        ValueError,
        r"targets must be in \[0, 5\).*got 5 \(first of 1\)",
    ),
    "targets ignored": (
        {"targets": torch.tensor([0, -100, -100, 1])},
        ValueError,
        r"leave rows that are not scored out.*got -100 \(first of 2\)",
    ),
    "bias shape": ({"bias": torch.zeros(4)}, ValueError, r"bias must be \[V\].*V = 5"),
    "bias dtype": ({"bias": torch.zeros(5).double()}, TypeError, "bias must have the dtype"),
    "softcap zero": ({"softcap": 0.0}, ValueError, "softcap must be > 0, or None.*got 0.0"),
    "softcap nan": ({"softcap": float("nan")}, ValueError, "softcap must be > 0"),
}
BAD_SEGMENTS = {
    "decreasing": (
        {"seq_ids": torch.tensor([0, 1, 0, 1])},
        ValueError,
        r"seq_ids must not decrease; sort.*got 0 \(first of 1\)",
    ),
    "too large": (
        {"seq_ids": SEQ_IDS + 1},
        ValueError,
        r"seq_ids must be in \[0, num_seqs = 2\); got 2",
    ),
    "negative": ({"seq_ids": SEQ_IDS - 1}, ValueError, r"seq_ids must be in.*got -1"),
    "shape": ({"seq_ids": SEQ_IDS[:2]}, ValueError, r"seq_ids must be \[N\]"),
    "dtype": ({"seq_ids": SEQ_IDS.int()}, TypeError, "seq_ids must be int64"),
    "device": ({"seq_ids": on_meta(SEQ_IDS)}, ValueError, "seq_ids must be on the device"),
    "num_seqs": ({"num_seqs": -1}, ValueError, "num_seqs must be >= 0, got -1"),
}


@pytest.mark.parametrize("impl", ["reference", *FUSED])
@pytest.mark.parametrize(("changes", "error", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_bad_arguments_are_explained(impl, changes, error, message):
    arguments = {"hidden": HIDDEN, "weight": WEIGHT, "targets": TARGETS, "impl": impl} | changes
    with pytest.raises(error, match=message):
        linear_logprob(**arguments)


@pytest.mark.parametrize(("changes", "error", "message"), BAD_SEGMENTS.values(), ids=BAD_SEGMENTS)
def test_bad_segments_are_explained(changes, error, message):
    arguments = {"seq_ids": SEQ_IDS, "num_seqs": 2} | changes
    with pytest.raises(error, match=message):
        sequence_logprobs(HIDDEN, WEIGHT, TARGETS, **arguments)
