"""Gumbel noise for draws, a stream of its own for each (seed, step, row id).

The same scores therefore draw the same negatives whatever the world size, the packing, the order
of rows, or a resume.
"""
# P prompts, C candidates

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mcpo.config import KernelConfig
from mcpo.streams import raw_numbers

# The step of what is drawn once, before any step: static negatives, the states chains begin in.
BEFORE_STEPS = -1


def draws_needed(config: KernelConfig) -> int:
    """How many numbers for each candidate a row's negatives are drawn from."""
    if config.scoring == "lazy":
        return config.num_negatives * 2 * config.chain_steps
    if config.chain != "none":
        return config.num_negatives * (1 + 2 * config.chain_steps)
    return config.num_negatives if config.replacement else 1


def gumbel_noise(
    seed: int, step: int, row_ids: Sequence[str], *, num_draws: int, num_candidates: int
) -> Tensor:
    """[P, num_draws, num_candidates] float64 standard Gumbel noise, one stream per (seed, step, row
    id).

    A row's noise for a candidate does not depend on how many candidates other rows have.
    """
    noise = np.empty((len(row_ids), num_candidates, num_draws))
    for row, row_id in enumerate(row_ids):
        # Candidates vary slowest, so that a wider batch only appends to a row's stream.
        raw = raw_numbers(f"{seed}/{step}/{row_id}", num_candidates * num_draws)
        noise[row] = _gumbel(raw).reshape(noise[row].shape)
    return torch.from_numpy(noise).transpose(1, 2)


def log_uniform(noise: Tensor) -> Tensor:
    """The logarithm of the uniform number that a Gumbel number was made of."""
    return -torch.exp(-noise)


def _gumbel(raw: NDArray[np.uint64]) -> NDArray[np.float64]:
    """From raw 64-bit numbers: numpy promises their stream across versions, Generator's not."""
    # 52 bits: with 53 the half would round the largest number up to 1, whose noise is infinite.
    uniform = ((raw >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
    return -np.log(-np.log(uniform))
