"""Stage 8: one optimizer step, the only place where stages 4 to 7 meet.

The loss of a step is the sum over its prompts divided by their number in the whole step, so batch
size, accumulation, token budget and world size change the schedule of the work and not the update.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mcpo.config import Config
from mcpo.engine import Engine
from mcpo.losses import loss_named, rewards
from mcpo.mc_kernel import Draw, candidate_scores, gumbel_noise, sample_negatives
from mcpo.policy import group_logps
from mcpo.records import PackedBatch, ScoredBatch
from mcpo.reference_cache import ReferenceLogps


@dataclass(frozen=True, kw_only=True, slots=True)
class StepWork:
    """What one rank does in one optimizer step."""

    step: int
    batches: tuple[PackedBatch, ...]
    """Micro-batches, at least one."""
    num_prompts: int
    """Of the whole step: all micro-batches of all ranks."""
    weight: float = 1.0
    """0 for a rank without prompts in this step, which runs along so that no rank waits for it."""


class NonFiniteError(RuntimeError):
    """A loss or a gradient is not finite; the message names the rows."""


def loss_on_batch(
    engine: Engine, batch: PackedBatch, references: ReferenceLogps, config: Config, step: int
) -> tuple[Tensor, ScoredBatch, Draw]:
    """Stages 4 to 7 on one micro-batch: the [P] losses, and what they were computed from."""
    # Made before the forward is queued: a copy to the device behind it would wait for it.
    ref_logp_PC = references.of(batch)
    noise_PMC = gumbel_noise(
        config.run.seed,
        step,
        batch.row_ids,
        num_draws=config.kernel.num_negatives if config.kernel.replacement else 1,
        num_candidates=batch.mask_PC.shape[1],
    ).to(engine.device)
    recompute = engine.policy.recompute_of(batch)
    logp_PC = group_logps(engine(batch, recompute), batch)
    score_PC = candidate_scores(
        logp_PC.detach(),
        ref_logp_PC,
        batch.length_PC,
        score=config.kernel.score,
        beta=config.loss.beta,
    )
    draw = sample_negatives(score_PC, batch.mask_PC, config.kernel, noise_PMC)
    if recompute is not None and engine.policy.recompute != "full":
        recompute.choose(segments_with_gradient(batch, draw))
    scored = ScoredBatch(
        logp_PC=logp_PC,
        ref_logp_PC=ref_logp_PC,
        length_PC=batch.length_PC,
        mask_PC=batch.mask_PC,
        negative_PM=draw.negative_PM,
        negative_mask_PM=draw.mask_PM,
    )
    return loss_named(config.loss.loss_type)(scored, config.loss), scored, draw


def segments_with_gradient(batch: PackedBatch, draw: Draw) -> list[int]:
    """The chosen and the drawn candidates, the only ones a loss may depend on.

    Which rows a backward has decides its shapes, so the host waits for the draw here.
    """
    chosen_P1 = batch.seq_of_PC[:, :1]
    drawn_PM = batch.seq_of_PC.gather(1, draw.negative_PM).where(draw.mask_PM, chosen_P1)
    seqs = torch.cat([chosen_P1, drawn_PM], dim=1).flatten().tolist()
    return [batch.segment_of_S[seq] for seq in seqs]


def train_step(
    engine: Engine, work: StepWork, references: ReferenceLogps, config: Config
) -> dict[str, float]:
    """Forward, backward, clip and update; returns the step's metrics, equal on every rank.

    Raises:
        NonFiniteError: before the update, so that the weights stay as they were.
    """
    totals: dict[str, Tensor] = {}
    losses: list[Tensor] = []
    rounds = engine.rounds(len(work.batches))
    for number, (batch, weight) in enumerate(weighted(work, rounds), start=1):
        with engine.micro_step(last=number == rounds):
            loss_P, scored, draw = loss_on_batch(engine, batch, references, config, work.step)
            engine.backward(loss_P.sum() * (weight / work.num_prompts))
        losses.append(loss_P.detach())
        for name, value_P in prompt_metrics(loss_P, scored, draw, config.loss.beta).items():
            total = value_P.detach().double().sum() * weight
            totals[name] = totals.get(name, torch.zeros_like(total)) + total
    grad_norm = engine.clip(config.optim.max_grad_norm)
    _check_finite(losses, grad_norm, work)
    engine.update()
    metrics = reduce_means(engine, totals, work.num_prompts)
    tokens = torch.tensor(
        sum(batch.layout.num_tokens for batch in work.batches) * work.weight, device=engine.device
    )
    return metrics | {
        "grad_norm": float(grad_norm),
        "learning_rate": float(engine.optimizer.param_groups[0]["lr"]),
        "num_tokens": float(engine.sum(tokens)),
    }


def weighted(work: StepWork, rounds: int) -> list[tuple[PackedBatch, float]]:
    """The micro-batches with their weights; after them the last once more with weight 0.

    That is for engines in which every rank must run as many as any other.
    """
    extra = rounds - len(work.batches)
    return [
        *((batch, work.weight) for batch in work.batches),
        *[(work.batches[-1], 0.0)] * extra,
    ]


def prompt_metrics(
    loss_P: Tensor, scored: ScoredBatch, draw: Draw, beta: float
) -> dict[str, Tensor]:
    """[P] values under TRL's names; ``rejected`` is the mean over the drawn negatives."""
    reward_PC = rewards(scored, beta)

    def drawn_mean(value_PC: Tensor) -> Tensor:
        value_PM = value_PC.gather(1, scored.negative_PM) * scored.negative_mask_PM
        return value_PM.sum(dim=1) / scored.negative_mask_PM.sum(dim=1)

    margin_PC = reward_PC[:, :1] - reward_PC
    return {
        "loss": loss_P,
        "rewards/chosen": reward_PC[:, 0],
        "rewards/rejected": drawn_mean(reward_PC),
        "rewards/margins": drawn_mean(margin_PC),
        "rewards/accuracies": drawn_mean((margin_PC > 0).double()),
        "logps/chosen": scored.logp_PC[:, 0],
        "logps/rejected": drawn_mean(scored.logp_PC),
        "mc/ess": draw.ess_P,
        "mc/drawn_rank": (draw.rank_PM * draw.mask_PM).sum(dim=1) / draw.mask_PM.sum(dim=1),
    }


def reduce_means(engine: Engine, totals: dict[str, Tensor], num_prompts: int) -> dict[str, float]:
    """Sums of this rank to means over all prompts: one collective and one host sync."""
    values = engine.sum(torch.stack(list(totals.values()))) / num_prompts
    return dict(zip(totals, values.tolist(), strict=True))


def _check_finite(losses: Sequence[Tensor], grad_norm: Tensor, work: StepWork) -> None:
    # One host sync for all of them.
    if bool(torch.cat([*losses, grad_norm[None]]).isfinite().all()):
        return
    rows = [
        row_id
        for batch, loss_P in zip(work.batches, losses[: len(work.batches)], strict=True)
        for row_id, finite in zip(batch.row_ids, loss_P.isfinite().tolist(), strict=True)
        if not finite
    ]
    if rows:
        what = f"the loss of rows {rows} is not finite"
    else:
        every = [row_id for batch in work.batches for row_id in batch.row_ids]
        what = f"the gradient is not finite though every loss is; this rank's rows were {every}"
    raise NonFiniteError(
        f"step {work.step}: {what}; the weights are those before this step. Lower learning_rate, "
        "or inspect these rows for extreme lengths"
    )
