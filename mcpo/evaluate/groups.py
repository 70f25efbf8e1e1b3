"""How well the policy's implicit rewards order held-out groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from mcpo.config import LossConfig
from mcpo.engine import Engine
from mcpo.losses import mcpo
from mcpo.policy import group_logps
from mcpo.records import PackedBatch, ScoredBatch
from mcpo.reference import Reference


@torch.no_grad()
def evaluate_groups(
    engine: Engine,
    batches: Sequence[PackedBatch],
    references: Reference,
    config: LossConfig,
    on_batch: Callable[[int], None] = lambda _: None,
) -> dict[str, float]:
    """Mean over prompts, each chosen completion against its whole pool; nothing is drawn.

    Args:
        engine: ranks share the batches and return the same values.
        batches: of all ranks, in the same order on each.
        references: of every row.
        config: for beta.
        on_batch: called with 1 after each batch of this rank.

    Returns:
        ``eval_loss`` (listwise, all negatives), ``eval_rewards/margins``, and
        ``eval_rewards/accuracies``: share of the pool whose reward is below the chosen one's, a tie
        counting one half, so that an untrained policy scores 0.5 but
        for rounding.
    """
    total = torch.zeros(4, dtype=torch.float64, device=engine.device)
    with engine.together():
        for batch in batches[engine.rank :: engine.world_size]:
            logp_PC = group_logps(engine.policy(batch), batch)
            total += _sums(logp_PC, batch, references, config)
            on_batch(1)
    loss, margins, accuracies, count = engine.sum(total).tolist()
    return {
        "eval_loss": loss / count,
        "eval_rewards/margins": margins / count,
        "eval_rewards/accuracies": accuracies / count,
    }


def _sums(
    logp_PC: torch.Tensor, batch: PackedBatch, references: Reference, config: LossConfig
) -> torch.Tensor:
    """[4] sums over prompts: loss, margin, accuracy, and their number."""
    num_columns = logp_PC.shape[1]
    pool_PM = torch.arange(1, num_columns, device=logp_PC.device).expand(len(logp_PC), -1)
    in_pool_PM = batch.mask_PC[:, 1:]
    scored = ScoredBatch(
        logp_PC=logp_PC,
        ref_logp_PC=references.of(batch),
        length_PC=batch.length_PC,
        mask_PC=batch.mask_PC,
        negative_PM=pool_PM,
        negative_mask_PM=in_pool_PM,
    )
    reward_PC = config.beta * (scored.logp_PC - scored.ref_logp_PC)
    margin_PM = reward_PC[:, :1] - reward_PC[:, 1:]
    won_PM = (margin_PM > 0).double() + 0.5 * (margin_PM == 0).double()
    size_P = in_pool_PM.sum(dim=1)
    per_prompt = (
        mcpo(scored, config),
        (margin_PM * in_pool_PM).sum(dim=1) / size_P,
        (won_PM * in_pool_PM).sum(dim=1) / size_P,
        torch.ones_like(size_P),
    )
    return torch.stack([value_P.double().sum() for value_P in per_prompt])
