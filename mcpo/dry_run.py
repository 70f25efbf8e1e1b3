"""What a run would do: rows, tokens, steps, an estimate of its memory; no weight is loaded."""

from __future__ import annotations

from dataclasses import replace

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from mcpo.adapters import attach
from mcpo.config import Config
from mcpo.engine import local_world_size, world_size
from mcpo.engine.choose import engine_name
from mcpo.lazy_chains import largest_visit
from mcpo.loop import count_steps, groups_per_step
from mcpo.models import load_config
from mcpo.pack import packed_length
from mcpo.prefix_sharing import refuse_if_asked_for
from mcpo.prepare import for_losses, load_groups
from mcpo.recompute import (
    activation_bytes,
    device_memory,
    largest_micro_batch,
    resolve_recompute,
    state_bytes,
)
from mcpo.reference import keeps_adapter, resolved_kind
from mcpo_kernels.integrations.packable import declared_refusal


def describe(config: Config, device: torch.device, console: Console) -> None:
    """Print rows, tokens, steps and memory."""
    model_config, tokenizer = load_config(config.model.model_name_or_path)
    groups = load_groups(config.data, tokenizer, config.run.seed, config.kernel)
    groups = for_losses(groups, config)
    console.print(groups.report)
    num_processes = world_size()
    model = without_weights(model_config)
    if config.adapter.adapts:
        attach(model, config.adapter, seed=config.run.seed, keep_reference=keeps_adapter(config))
    refusal = declared_refusal(model)
    how = "packed, if the check at the start agrees"
    if refusal is not None:
        refuse_if_asked_for(config, refusal)
        config = replace(config, model=replace(config.model, prefix_sharing="off"))
        how = f"one sequence per row: {refusal}"
    share = config.model.shares_prefixes
    visited = [largest_visit(group, config.kernel) for group in groups.train]
    tokens = [packed_length(group, share) for group in visited]
    unshared = [packed_length(group, False) for group in visited]
    steps = count_steps(config.optim, len(groups.train), num_processes)
    per_step = groups_per_step(config.optim, num_processes)
    memory = device_memory(device, local_world_size())
    state = state_bytes(config, model, engine_name(config.scale), num_processes)
    recompute = resolve_recompute(
        config, groups.train, model, memory, packs=refusal is None, state=state
    )
    micro_batch = largest_micro_batch(config, groups.train)
    activations = activation_bytes(model_config, micro_batch, recompute.mode)
    table = Table(title="dry run: nothing was trained", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    for name, value in (
        ("groups, per step", f"{len(tokens):,}, {per_step}"),
        ("steps", f"{steps:,}"),
        ("epochs", f"{steps * per_step / len(tokens):.2f}"),
        ("batches", how),
        ("tokens an epoch", f"{sum(tokens):,}"),
        ("of which a shared prompt saves", f"{1 - sum(tokens) / sum(unshared):.0%}"),
        ("largest micro-batch", f"{micro_batch:,} tokens"),
        ("parameters", f"{model.num_parameters():,}"),
        ("of which are trained", f"{model.num_parameters(only_trainable=True):,}"),
        ("reference", resolved_kind(config)),
        ("weights, gradients, optimizer", f"{state / 1e6:,.0f} MB"),
        ("recompute", recompute.mode),
        ("activations, estimated", f"{activations / 1e6:,.0f} MB"),
    ):
        table.add_row(name, value)
    console.print(table)


def without_weights(config: PretrainedConfig) -> PreTrainedModel:
    """A model whose parameters have shapes and no numbers."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)
