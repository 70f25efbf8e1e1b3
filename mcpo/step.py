"""Stage 8: one optimizer step, the only place where stages 4 to 7 meet.

The loss of a step is the sum over its prompts divided by their number in the whole step, so batch
size, accumulation, token budget and world size change the schedule of the work and not the update.
Means over tokens, and what losses of earlier steps left behind, are of whole steps too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from mcpo.config import Config, LossConfig
from mcpo.engine import Engine
from mcpo.lazy_chains import LazyChains
from mcpo.losses import over_pool, reaches_pool, rewards, terms_of
from mcpo.mc_kernel import (
    Draw,
    LazyBatch,
    candidate_scores,
    draws_needed,
    gumbel_noise,
    lazy_draw,
    sample_negatives,
)
from mcpo.mc_kernel.lazy import audit, with_fresh
from mcpo.policy import group_logps, mismatched_logps
from mcpo.records import Baselines, PackedBatch, ScoredBatch
from mcpo.reference import Reference


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
    chosen_tokens: int | None = None
    """Completion tokens of the chosen of the whole step; losses with an NLL need it."""
    baselines: Baselines = field(default_factory=Baselines)
    """What ``bco`` and ``kto`` judge rewards against."""
    rows: tuple[int, ...] = ()
    """The groups of the whole step, by number."""
    visits: tuple[LazyBatch, ...] = ()
    """With ``scoring: lazy``, what the chains bring to each of ``batches``."""
    audits: tuple[tuple[PackedBatch, LazyBatch], ...] = ()
    """The same prompts with all their candidates, where this step is one to audit."""


class NonFiniteError(RuntimeError):
    """A loss or a gradient is not finite; the message names the rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchLoss:
    """Stages 4 to 7 of one micro-batch."""

    loss_P: Tensor
    """The weighted sum of ``terms``."""
    terms: dict[str, Tensor]
    """[P] each loss of the sum, by name and without its weight."""
    scored: ScoredBatch
    draw: Draw
    mismatched_P: Tensor | None
    """[P] log-ratios of mismatched completions, without gradient; None where there are none."""


def loss_on_batch(
    engine: Engine,
    batch: PackedBatch,
    references: Reference,
    config: Config,
    work: StepWork,
    lazy: LazyBatch | None = None,
) -> BatchLoss:
    """Stages 4 to 7 on one micro-batch of ``work``.

    ``lazy`` is what the chains bring to it, where they chose its candidates.
    """
    # Made before the forward is queued: a copy to the device behind it would wait for it.
    ref_logp_PC, ref_mismatched_P = references.with_mismatched(batch)
    if lazy is None:
        noise_PDC = gumbel_noise(
            config.run.seed,
            work.step,
            batch.row_ids,
            num_draws=draws_needed(config.kernel),
            num_candidates=batch.mask_PC.shape[1],
        ).to(engine.device)
        draw_from = partial(sample_negatives, config=config.kernel, noise_PDC=noise_PDC)
    else:
        draw_from = partial(lazy_draw, lazy=lazy, config=config.kernel)
    recompute = engine.policy.recompute_of(batch)
    logp_S = engine(batch, recompute)
    logp_PC = group_logps(logp_S, batch)
    score_PC = _scores(batch, logp_PC, ref_logp_PC, config)
    draw = draw_from(score_PC, batch.mask_PC)
    if recompute is not None and engine.policy.recompute != "full":
        recompute.choose(segments_with_gradient(batch, draw, pool=reaches_pool(config.loss)))
    scored = ScoredBatch(
        logp_PC=logp_PC,
        ref_logp_PC=ref_logp_PC,
        length_PC=batch.length_PC,
        mask_PC=batch.mask_PC,
        negative_PM=draw.negative_PM,
        negative_mask_PM=draw.mask_PM,
        mean_chosen_length=work.chosen_tokens and work.chosen_tokens / work.num_prompts,
        rating_PC=batch.external_score_PC,
        baselines=work.baselines,
    )
    if config.loss.augmented:
        scored = over_pool(scored)
    terms = terms_of(config.loss)
    values = {term.name: term.loss(scored, config.loss) for term in terms}
    return BatchLoss(
        loss_P=torch.stack([term.weight * values[term.name] for term in terms]).sum(dim=0),
        terms=values,
        scored=scored,
        draw=draw,
        mismatched_P=None
        if ref_mismatched_P is None
        else mismatched_logps(logp_S.detach(), batch) - ref_mismatched_P,
    )


def _scores(batch: PackedBatch, logp_PC: Tensor, ref_logp_PC: Tensor, config: Config) -> Tensor:
    """[P, C] what draws weigh, without gradient."""
    return candidate_scores(
        logp_PC.detach(),
        ref_logp_PC,
        batch.length_PC,
        score=config.kernel.score,
        beta=config.loss.beta,
        external_PC=batch.external_score_PC,
    )


def segments_with_gradient(batch: PackedBatch, draw: Draw, *, pool: bool = False) -> list[int]:
    """The chosen and the drawn candidates, or all of them, the only ones a loss may depend on.

    Which rows a backward has decides its shapes, so the host waits for the draw here.
    """
    if pool:
        return [batch.segment_of_S[seq] for seq in batch.seq_of_PC[batch.mask_PC].tolist()]
    chosen_P1 = batch.seq_of_PC[:, :1]
    drawn_PM = batch.seq_of_PC.gather(1, draw.negative_PM).where(draw.mask_PM, chosen_P1)
    seqs = torch.cat([chosen_P1, drawn_PM], dim=1).flatten().tolist()
    return [batch.segment_of_S[seq] for seq in seqs]


def train_step(
    engine: Engine,
    work: StepWork,
    references: Reference,
    config: Config,
    chains: LazyChains | None = None,
) -> dict[str, float]:
    """Forward, backward, clip and update; returns the step's metrics, equal on every rank.

    ``chains`` are moved, where there are any, once the weights are.

    Raises:
        NonFiniteError: before the update, so that the weights stay as they were.
    """
    totals: dict[str, Tensor] = {}
    losses: list[Tensor] = []
    # One audit of all ranks: how many micro-batches each makes of it is its own matter.
    with engine.together() if work.audits else nullcontext():
        for batch, lazy in work.audits:
            _add(totals, _audit(engine, batch, lazy, references, config, chains, work), work.weight)
    rounds = engine.rounds(len(work.batches))
    for number, (batch, lazy, weight) in enumerate(weighted(work, rounds), start=1):
        with engine.micro_step(last=number == rounds):
            found = loss_on_batch(engine, batch, references, config, work, lazy)
            engine.backward(found.loss_P.sum() * (weight / work.num_prompts))
        losses.append(found.loss_P.detach())
        values = prompt_metrics(found.loss_P, found.scored, found.draw, config.loss.beta)
        _add(totals, values | loss_metrics(found, config.loss), weight)
        if chains and lazy and weight:
            scored, draw = found.scored, found.draw
            score_PC = _scores(batch, scored.logp_PC, scored.ref_logp_PC, config)
            chains.note(batch, score_PC, lazy.column_PC.gather(1, draw.negative_PM))
    grad_norm = engine.clip(config.optim.max_grad_norm)
    _check_finite(losses, grad_norm, work)
    engine.update()
    if chains:
        chains.agree(engine, work.rows, work.step)
    metrics = reduce_means(engine, totals, work.num_prompts)
    tokens = torch.tensor(
        sum(batch.layout.num_tokens for batch in work.batches) * work.weight, device=engine.device
    )
    return metrics | {
        "grad_norm": float(grad_norm),
        "learning_rate": float(engine.optimizer.param_groups[0]["lr"]),
        "num_tokens": float(engine.sum(tokens)),
    }


def weighted(work: StepWork, rounds: int) -> list[tuple[PackedBatch, LazyBatch | None, float]]:
    """The micro-batches with their visits and weights; then the last once more with weight 0.

    That is for engines in which every rank must run as many as any other.
    """
    visits = work.visits or (None,) * len(work.batches)
    extra = rounds - len(work.batches)
    return [
        *((batch, lazy, work.weight) for batch, lazy in zip(work.batches, visits, strict=True)),
        *[(work.batches[-1], visits[-1], 0.0)] * extra,
    ]


def _add(totals: dict[str, Tensor], metrics: Mapping[str, Tensor], weight: float) -> None:
    """Sum over the prompts of a batch, onto the sums so far."""
    for name, value_P in metrics.items():
        total = value_P.detach().double().sum() * weight
        totals[name] = totals.get(name, torch.zeros_like(total)) + total


@torch.no_grad()
def _audit(
    engine: Engine,
    batch: PackedBatch,
    lazy: LazyBatch,
    references: Reference,
    config: Config,
    chains: LazyChains | None,
    work: StepWork,
) -> dict[str, Tensor]:
    """Score whole pools once, compare the lazy kernel with the full one, and keep the scores."""
    logp_PC = group_logps(engine.policy(batch), batch)
    score_PC = _scores(batch, logp_PC, references.of(batch), config)
    if chains and work.weight:
        chains.note(batch, score_PC, lazy.state_PM)
    return audit(lazy, with_fresh(lazy, score_PC, batch.mask_PC), config.kernel)


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
        "mc/entropy": draw.entropy_P,
        "mc/drawn_rank": (draw.rank_PM * draw.mask_PM).sum(dim=1) / draw.mask_PM.sum(dim=1),
        **draw.chain,
    }


def loss_metrics(found: BatchLoss, config: LossConfig) -> dict[str, Tensor]:
    """[P] values that only some losses have: the terms of a sum, and what rewards are judged by."""
    values: dict[str, Tensor] = {}
    if len(found.terms) > 1:
        values |= {f"loss/{name}": term_P for name, term_P in found.terms.items()}
    baselines = found.scored.baselines
    if "bco" in found.terms:
        values["bco/delta"] = torch.full_like(found.loss_P, baselines.delta)
    if found.mismatched_P is not None:
        values["kto/mismatched"] = config.beta * found.mismatched_P
        values["kto/z0"] = torch.full_like(found.loss_P, baselines.z0)
    return values


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
