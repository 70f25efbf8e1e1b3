"""The order in which groups are met: a pure function of (seed, epoch, step, rank).

Nothing is stored for a resume but the step number, and the groups of a step do not depend on the
number of ranks that share them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


# A step asks for the order of its epoch; two are kept for the step after an epoch ends.
@lru_cache(maxsize=2)
def epoch_order(num_rows: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """A permutation of ``range(num_rows)``, read-only.

    Raises:
        ValueError: a negative argument.
    """
    if min(num_rows, seed, epoch) < 0:
        raise ValueError(
            f"num_rows, seed and epoch must be >= 0, got {num_rows}, {seed} and {epoch}"
        )
    # numpy promises the raw stream of a bit generator across versions, not Generator.permutation.
    keys = np.random.Philox(np.random.SeedSequence((seed, epoch))).random_raw(num_rows)
    order = np.argsort(keys, kind="stable").astype(np.int64)
    order.flags.writeable = False
    return order


def steps_per_epoch(num_rows: int, groups_per_step: int) -> int:
    """Steps that meet every row once; the last may be smaller.

    Raises:
        ValueError: an argument is not positive.
    """
    if num_rows < 1 or groups_per_step < 1:
        raise ValueError(
            f"num_rows and groups_per_step must be at least 1, got {num_rows} and {groups_per_step}"
        )
    return -(-num_rows // groups_per_step)


def step_rows(
    num_rows: int, step: int, *, groups_per_step: int, seed: int
) -> tuple[int, tuple[int, ...]]:
    """The epoch (from 0) that ``step`` (from 0) lies in and its rows, never of two epochs.

    Raises:
        ValueError: a negative step, or no rows.
    """
    if step < 0:
        raise ValueError(f"step must be >= 0, got {step}")
    epoch, step_in_epoch = divmod(step, steps_per_epoch(num_rows, groups_per_step))
    begin = step_in_epoch * groups_per_step
    order = epoch_order(num_rows, seed, epoch)
    return epoch, tuple(order[begin : begin + groups_per_step].tolist())


def rank_share(indices: Sequence[int], rank: int, world_size: int) -> tuple[int, ...]:
    """The consecutive part of a step's rows that ``rank`` works on; sizes differ by at most one.

    A rank gets none when there are fewer rows than ranks.

    Raises:
        ValueError: ``rank`` is not in ``[0, world_size)``.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in [0, world_size), got rank {rank} of {world_size}")
    begin, end = (len(indices) * part // world_size for part in (rank, rank + 1))
    return tuple(indices[begin:end])
