"""``sampling: static``: each row's negatives are drawn once, when the data is built.

What is left is the chosen one and what was drawn, so the run packs and scores nothing else: with
one negative a step costs what a DPO step does, and so does the reference.
"""
# P prompts, C candidates

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from mcpo.config import KernelConfig
from mcpo.mc_kernel import draws_needed, gumbel_noise, sample_negatives
from mcpo.mc_kernel.noise import BEFORE_STEPS
from mcpo.records import TokenizedGroup

# Rows that are drawn for in one call.
_ROWS_PER_CALL = 1024


def fix_negatives(
    groups: Sequence[TokenizedGroup], config: KernelConfig, seed: int
) -> tuple[TokenizedGroup, ...]:
    """The groups with their drawn negatives as their whole pools.

    A row's draw depends on the seed, its id, and its pool with its scores alone.
    """
    fixed: list[TokenizedGroup] = []
    for begin in range(0, len(groups), _ROWS_PER_CALL):
        some = groups[begin : begin + _ROWS_PER_CALL]
        num_P = torch.tensor([group.num_candidates for group in some])
        mask_PC = torch.arange(int(num_P.max())) < num_P[:, None]
        score_PC = torch.zeros(mask_PC.shape, dtype=torch.float64)
        if config.score == "external":
            for score_C, group in zip(score_PC, some, strict=True):
                # The chosen one's is not looked at, and may be missing.
                score_C[1 : group.num_candidates] = torch.tensor(group.scores[1:])
        noise_PDC = gumbel_noise(
            seed,
            BEFORE_STEPS,
            [group.row_id for group in some],
            num_draws=draws_needed(config),
            num_candidates=mask_PC.shape[1],
        )
        draw = sample_negatives(score_PC, mask_PC, config, noise_PDC)
        for group, columns, drawn in zip(
            some, draw.negative_PM.tolist(), draw.mask_PM.tolist(), strict=True
        ):
            kept = [column for column, exists in zip(columns, drawn, strict=True) if exists]
            # For all that follows this is the row, with its reference and its identity.
            fixed.append(replace(group.only((0, *kept)), columns=()))
    return tuple(fixed)


def check_external_scores(groups: Sequence[TokenizedGroup]) -> None:
    """Refuse rows whose pools are not scored throughout.

    Raises:
        ValueError: names the first such row.
    """
    for group in groups:
        pool = group.scores[1:] if group.scores else (None,) * (group.num_candidates - 1)
        if None in pool:
            raise ValueError(
                "score: external needs a score for every candidate of a pool, and row "
                f"{group.row_id!r} has none for {pool.count(None)} of {len(pool)} (ranks are no "
                "scores, and a noise candidate has none); give the rows scores or set another "
                "score"
            )
