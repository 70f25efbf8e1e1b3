"""What a run would do: rows, tokens, steps, an estimate of its memory; no weight is loaded."""

from __future__ import annotations

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, PretrainedConfig

from mcpo.config import Config
from mcpo.engine import world_size
from mcpo.loop import count_steps, groups_per_step
from mcpo.models import load_config
from mcpo.pack import packed_length
from mcpo.prepare import load_groups

# Bytes a float32 parameter takes while training: itself, its gradient, and AdamW's two moments.
BYTES_PER_PARAMETER = 16


def describe(config: Config, console: Console) -> None:
    """Print rows, tokens, steps and memory."""
    model_config, tokenizer = load_config(config.model.model_name_or_path)
    groups = load_groups(config.data, tokenizer, config.run.seed)
    console.print(groups.report)
    num_processes = world_size()
    share = config.model.shares_prefixes
    tokens = [packed_length(group, share) for group in groups.train]
    unshared = [packed_length(group, False) for group in groups.train]
    steps = count_steps(config.optim, len(groups.train), num_processes)
    per_step = groups_per_step(config.optim, num_processes)
    num_parameters = count_parameters(model_config)
    micro_batch = min(
        max(config.optim.max_tokens_per_micro_batch, max(tokens)),
        sum(sorted(tokens)[-config.optim.per_device_train_batch_size :]),
    )
    activations = activation_bytes(model_config, micro_batch, config.model.gradient_checkpointing)
    table = Table(title="dry run: nothing was trained", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    for name, value in (
        ("groups, per step", f"{len(tokens):,}, {per_step}"),
        ("steps", f"{steps:,}"),
        ("epochs", f"{steps * per_step / len(tokens):.2f}"),
        ("packed tokens an epoch", f"{sum(tokens):,}"),
        ("of which a shared prompt saves", f"{1 - sum(tokens) / sum(unshared):.0%}"),
        ("largest micro-batch", f"{micro_batch:,} tokens"),
        ("parameters", f"{num_parameters:,}"),
        ("weights, gradients, optimizer", f"{num_parameters * BYTES_PER_PARAMETER / 1e6:,.0f} MB"),
        ("activations, estimated", f"{activations / 1e6:,.0f} MB"),
    ):
        table.add_row(name, value)
    console.print(table)


def count_parameters(config: PretrainedConfig) -> int:
    """Parameters of a model, tied ones once, from its configuration alone."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


def activation_bytes(config: PretrainedConfig, num_tokens: int, checkpointed: bool) -> int:
    """Rough bytes kept for the backward of a micro-batch of a Llama-like model.

    Per token and layer: four vectors of the residual stream and its norms in float32, queries,
    keys, values and attention output, and four of the feed-forward width, in two bytes each. With
    checkpointing a layer keeps its input alone, and one layer at a time the rest.
    """
    text = config.get_text_config()
    hidden, layers = text.hidden_size, text.num_hidden_layers
    wide = getattr(text, "intermediate_size", None) or 4 * hidden
    inside = 4 * 4 * hidden + 2 * 4 * hidden + 2 * 4 * wide
    if checkpointed:
        return num_tokens * (4 * hidden * layers + inside)
    return num_tokens * inside * layers
