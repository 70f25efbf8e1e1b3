"""The reference of a run: as a rule every candidate scored once by the policy as it was loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from mcpo import reference_cache
from mcpo.config import Config
from mcpo.engine import Engine
from mcpo.losses import loss_named
from mcpo.pack import move, pack, split_by_budget
from mcpo.policy import group_logps, mismatched_logps
from mcpo.prepare import Groups
from mcpo.progress import progress
from mcpo.records import PackedBatch, TokenizedGroup
from mcpo.reference import (
    NoReference,
    Reference,
    ReferenceSync,
    as_it_began,
    described,
    live_reference,
    resolved_kind,
)
from mcpo.reference_cache import ReferenceLogps
from mcpo.self_check import check_reference
from mcpo_kernels import resolve

# The check of the reference looks at this many groups: enough to meet every kind of row, cheap
# beside a step.
NUM_CHECKED_GROUPS = 4


def make_reference(
    engine: Engine,
    groups: Groups,
    config: Config,
    console: Console,
    *,
    weights: str,
    rounding: float,
) -> tuple[Reference, ReferenceSync | None]:
    """The reference of the kind that is asked for, checked against the policy, and what moves it.

    To be called before the first update, while the policy still is the reference, whose hash
    ``weights`` is. ``rounding`` is the model's, as the check of packing measured it.

    Raises:
        ValueError: the check fails, the cache cannot be used, or a kind is asked for that the run
            cannot have.
    """
    kind = resolved_kind(config)
    if kind == "none":
        console.print("reference: none, the loss and the score need none")
        return NoReference(), None
    sync = None
    if kind == "live":
        reference, sync = live_reference(engine.policy, config)
        moves = f"synced every {sync.steps} steps" if sync else "frozen"
        console.print(f"reference: live, {moves}")
    else:
        reference = reference_logps(engine, groups, config, console, weights=weights)
    if config.run.self_check:
        _self_check(engine, groups, reference, config, console, rounding=rounding)
    return reference, sync


def reference_logps(
    engine: Engine, groups: Groups, config: Config, console: Console, *, weights: str
) -> ReferenceLogps:
    """Compute or find the reference log-probs of all groups.

    Ranks share the work through the cache folder.

    Raises:
        ValueError: the cache cannot be used.
    """
    every = (*groups.train, *groups.held_out)
    share = config.model.shares_prefixes
    # Apart: held-out groups have no mismatched completions where the others may.
    batches = [
        batch
        for part in (groups.train, groups.held_out)
        for batch in split_by_budget(part, config.optim.max_tokens_per_micro_batch, share)
    ]
    folder = _folder(engine, config, weights)
    began = as_it_began(engine.policy, config)

    @torch.no_grad()
    def score(some: Sequence[TokenizedGroup]) -> list[list[float]]:
        batch = move(pack(some, share_prefix=share), engine.device)
        with began():
            logp_S = engine.policy(batch)
        mismatched_P = None if batch.mismatched_P is None else mismatched_logps(logp_S, batch)
        return reference_cache.unpack(group_logps(logp_S, batch), batch, mismatched_P)

    mine = len(batches[engine.rank :: engine.world_size])
    with (
        progress(console, "reference", mine, quiet=engine.rank != 0) as advance,
        engine.together(),
    ):
        computed = reference_cache.complete(
            folder,
            batches,
            score,
            rank=engine.rank,
            world_size=engine.world_size,
            on_batch=lambda done: advance(1, ""),
        )
    engine.barrier()
    console.print(
        f"reference log-probs: {'computed' if computed else 'found'} in {folder}", soft_wrap=True
    )
    return reference_cache.verified(folder, every)


def packed_batches(
    groups: Sequence[TokenizedGroup], config: Config, device: torch.device
) -> list[PackedBatch]:
    """Groups in their order, packed as training packs them, on the device."""
    share = config.model.shares_prefixes
    micro_batches = split_by_budget(groups, config.optim.max_tokens_per_micro_batch, share)
    return [move(pack(some, share_prefix=share), device) for some in micro_batches]


def _folder(engine: Engine, config: Config, weights: str) -> Path:
    """Where the values of these weights, evaluated this way, are kept."""
    policy = engine.policy
    dtype = policy.autocast_dtype or torch.float32
    settings: dict[str, Any] = {
        "autocast": str(policy.autocast_dtype),
        "model": {
            name: value
            for name, value in policy.model.config.to_diff_dict().items()
            if name not in ("_name_or_path", "transformers_version", "dtype")
        },
        "device": engine.device.type,
        "prefix_sharing": config.model.shares_prefixes,
        "packs": policy.packs,
        # The one that runs: "auto" may be another after an installation.
        "head_impl": resolve(config.model.head_impl, engine.device, dtype).impl.value,
        "attention_impl": config.model.attention_impl,
        "reduction": "sum",
        **described(policy, config),
    }
    root = config.run.reference_cache_dir
    key = reference_cache.cache_key(weights, settings)
    return (Path(root) if root else reference_cache.default_cache_dir()) / key


def _self_check(
    engine: Engine,
    groups: Groups,
    reference: Reference,
    config: Config,
    console: Console,
    *,
    rounding: float,
) -> None:
    checked = packed_batches(groups.train[:NUM_CHECKED_GROUPS], config, engine.device)
    # What else is minimised, the log-ratios that it is a function of are checked all the same.
    name = config.loss.loss_type[0] if config.loss.loss_type in (("dpo",), ("mcpo",)) else "mcpo"
    gap = check_reference(
        engine.policy,
        checked,
        reference,
        beta=config.loss.beta,
        rounding=rounding,
        # dpo is a mean over pairs: it contrasts one negative at a time.
        num_negatives=1 if name == "dpo" else config.kernel.num_negatives,
        loss=lambda scored: loss_named(name)(scored, config.loss),
    )
    console.print(
        f"self-check passed: log-probs are the model's own but for rounding, {rounding:.1e} nats "
        f"per root of a token; policy equals reference to {gap:.1e} nats",
        soft_wrap=True,
    )
