"""What must hold of the arguments, and what to do where it does not."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check_inputs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    *,
    slab: bool = False,
) -> None:
    """Raise unless shapes, dtypes and devices fit; looks at no values, so nothing waits.

    ``slab``: the weight is that of one rank of a group and may have no rows.
    """
    _check_plain(hidden, weight, targets, bias)
    if not slab:
        _check_weight_is_whole(weight)
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            "hidden must be [N, D] and weight [V, D] with the same D, got "
            f"{list(hidden.shape)} and {list(weight.shape)}; select the scored rows first, "
            "e.g. hidden[scored]"
        )
    if targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"targets must be [N], one per row of hidden, got {list(targets.shape)} for "
            f"N = {hidden.shape[0]}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias must be [V], one per row of weight, got {list(bias.shape)} for "
            f"V = {weight.shape[0]}"
        )
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be > 0, or None for no cap, got {softcap}")
    _check_dtypes(hidden, weight, targets, bias)
    for name, tensor in (("weight", weight), ("targets", targets), ("bias", bias)):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(
                f"{name} must be on the device of hidden, got {tensor.device} and {hidden.device}; "
                f"move it with .to(hidden.device)"
            )


def check_allowance(cache_mb: float, filter_mass: float) -> None:
    """Raise unless both are in range; ``not`` refuses NaN too."""
    if not 0 <= cache_mb < float("inf"):
        raise ValueError(
            f"cache_mb must be finite and >= 0, got {cache_mb}; all logits take 4 bytes each (8 in "
            "float64), V rounded up to a multiple of 64"
        )
    if not 0 <= filter_mass < 1:
        raise ValueError(
            "filter_mass must be in [0, 1), a share of what a row's target does not hold of its "
            f"softmax, got {filter_mass}; 0 leaves nothing out"
        )


def check_segments(hidden: Tensor, seq_ids: Tensor, num_seqs: int) -> None:
    """Raise unless ``seq_ids`` and ``num_seqs`` fit ``hidden`` in shape, dtype and device."""
    if num_seqs < 0:
        raise ValueError(f"num_seqs must be >= 0, got {num_seqs}")
    if seq_ids.shape != hidden.shape[:1]:
        raise ValueError(
            f"seq_ids must be [N], one per row of hidden, got {list(seq_ids.shape)} for "
            f"N = {hidden.shape[0]}"
        )
    if seq_ids.dtype != torch.int64:
        raise TypeError(f"seq_ids must be int64, got {seq_ids.dtype}; convert it with .long()")
    if seq_ids.device != hidden.device:
        raise ValueError(
            f"seq_ids must be on the device of hidden, got {seq_ids.device} and {hidden.device}; "
            "move it with .to(hidden.device)"
        )


def check_targets(targets: Tensor, num_vocab: int | Tensor) -> None:
    """Raise unless every target is in [0, V).

    On a CUDA device the check is an assertion on the device, which nothing waits for and which
    says less; V may be a tensor there.
    """
    valid = (targets >= 0) & (targets < num_vocab)
    limit = num_vocab if isinstance(num_vocab, int) else "V"
    message = (
        f"targets must be in [0, {limit}), the rows of weight; leave rows that are not scored "
        "out instead of marking them, e.g. with hidden[scored] and targets[scored]"
    )
    _check_values(targets, valid, message)


def check_seq_ids(seq_ids: Tensor, num_seqs: int) -> None:
    """Raise unless the ids never decrease and are in [0, S); on CUDA as ``check_targets``."""
    valid = (seq_ids >= 0) & (seq_ids < num_seqs)
    _check_values(seq_ids, valid, f"seq_ids must be in [0, num_seqs = {num_seqs})")
    message = (
        "seq_ids must not decrease; sort the rows by sequence first, e.g. with seq_ids.argsort()"
    )
    _check_values(seq_ids[1:], seq_ids[1:] >= seq_ids[:-1], message)


def _check_values(values: Tensor, valid: Tensor, message: str) -> None:
    if values.device.type != "cpu":
        torch.ops.aten._assert_async.msg(valid.all(), message)
    elif not valid.all():
        row = int(valid.logical_not().nonzero()[0])
        raise ValueError(f"{message}; got {int(values[row])} (first of {int((~valid).sum())})")


def check_slabs(size_R: Tensor, digest_R: Tensor) -> None:
    """Raise if two ranks hold the same rows of the head; on CUDA as ``check_targets``.

    The digests are of a few rows, and 0 where those are all zeros, as in a head before training.
    """
    same_RR = (size_R == size_R[:, None]) & (digest_R == digest_R[:, None]) & (digest_R != 0)
    same_RR = same_RR.tril(-1)
    message = (
        "every rank of group must hold rows of its own of the head, got the same weight on two; "
        "pass each rank its slab, or leave group out where the head is whole"
    )
    if same_RR.device.type != "cpu":
        torch.ops.aten._assert_async.msg(same_RR.logical_not().all(), message)
    elif same_RR.any():
        later, earlier = same_RR.nonzero()[0].tolist()
        raise ValueError(f"{message}; these are ranks {earlier} and {later}")


def check_impl_takes_group(group_name: str | None) -> None:
    """Raise if there is a group; for the reference."""
    if group_name is not None:
        raise RuntimeError(
            "impl='reference' cannot run here: it takes the whole head, got a slab and a group; "
            "gather the weight for it, e.g. weight.full_tensor(), or use 'chunked' or 'auto'"
        )


def _check_plain(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> None:
    # By attribute, so that torch.distributed need not be imported to ask.
    for name, tensor in (("weight", weight), ("bias", bias)):
        if hasattr(tensor, "placements"):
            raise TypeError(
                f"{name} must be a plain tensor, got a DTensor sharded by FSDP2 or tensor "
                "parallelism; call this inside the forward of the module that owns the weight, "
                "where it is gathered; for a head that tensor parallelism shards by rows, with "
                "the same rows of hidden on every rank, pass group= too"
            )
    for name, tensor in (("hidden", hidden), ("targets", targets)):
        if hasattr(tensor, "placements"):
            raise TypeError(
                f"{name} must be a plain tensor, got a DTensor; make it whole on every rank and "
                f"take that, e.g. {name}.redistribute(placements=[Replicate()]).to_local()"
            )


def _check_weight_is_whole(weight: Tensor) -> None:
    if weight.numel() == 0:
        raise ValueError(
            f"weight must have elements, got shape {list(weight.shape)}; a weight partitioned by "
            "ZeRO-3 or FSDP is empty outside its module: call this inside the forward of the "
            "module that owns it"
        )


def _check_dtypes(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> None:
    if hidden.dtype not in FLOAT_DTYPES:
        raise TypeError(f"hidden must be bfloat16, float16, float32 or float64, got {hidden.dtype}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != hidden.dtype:
            raise TypeError(
                f"{name} must have the dtype of hidden, got {tensor.dtype} and {hidden.dtype}; "
                "cast one of them, e.g. weight.to(hidden.dtype) under autocast"
            )
    if targets.dtype != torch.int64:
        raise TypeError(f"targets must be int64, got {targets.dtype}; convert them with .long()")
