"""What the ranks of a group must have in common, compared in one small all-gather."""
# R ranks, K numbers of each

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from torch.distributed import ProcessGroup

# 2^64 over the golden ratio, as int64: its multiples are spread over all numbers.
SPREAD = -7046029254386353131
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def digest(tensor: Tensor) -> Tensor:
    """A number that tells tensors of other bits apart, but for chance; 0 for all bits 0."""
    bits = tensor.detach().contiguous().view(INTEGERS[tensor.dtype.itemsize]).flatten().long()
    spread = torch.arange(1, bits.numel() + 1, device=bits.device) * SPREAD
    # Integers wrap around. The upper half is the better mixed one.
    return (bits * (spread ^ (spread >> 32))).sum()


def gather_row(numbers: Sequence[int], digests: Sequence[Tensor], group: ProcessGroup) -> Tensor:
    """[R, K] the numbers and digests of every rank."""
    digest_K = torch.stack(list(digests))
    row_K = torch.cat([torch.tensor(numbers, device=digest_K.device), digest_K])
    table = row_K.new_empty(group.size() * row_K.numel())
    dist.all_gather_single(table, row_K, group=group)
    return table.view(group.size(), -1)


def check_same(table_RK: Tensor, names: Sequence[str], advice: str) -> None:
    """Raise unless each column is the same for all ranks.

    Every rank sees the same table, so all raise or none does. On a CUDA device the check is an
    assertion on the device, which nothing waits for and which says less.
    """
    same_K = (table_RK == table_RK[0]).all(0)
    if table_RK.device.type != "cpu":
        message = f"{', '.join(names)} must be the same on every rank of group; {advice}"
        torch.ops.aten._assert_async.msg(same_K.all(), message)
        return
    for name, same, value_R in zip(names, same_K.tolist(), table_RK.T, strict=True):
        if not same:
            rank = int((value_R != value_R[0]).nonzero()[0])
            raise ValueError(
                f"{name} must be the same on every rank of group, got another one on rank {rank} "
                f"than on rank 0; {advice}"
            )
