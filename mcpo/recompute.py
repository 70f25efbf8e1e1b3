"""What the backward computes again: how much is kept in the forward is a trade of memory for work.

=========  ================================================  ==================================
mode       kept until the negatives are drawn, for all rows  computed again, for rows with gradient
=========  ================================================  ==================================
none       everything                                        nothing; but the backward runs over
                                                             all rows
light      inputs of layers, results of linear layers,       what lies between these
           of attention where its kernel allows, and of
           the head
selective  inputs of layers                                  the layers
full       inputs of layers                                  the layers, over all rows
=========  ================================================  ==================================

With T packed tokens of which R have gradient, and the forward of a token's layers as the unit, a
step costs 3T, about T + 2R, T + 3R and 4T. All give the same gradient but for rounding.
"""
# T packed tokens

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PretrainedConfig, PreTrainedModel

from mcpo.config import Config, ModelConfig
from mcpo.engine.choose import bytes_per_parameter
from mcpo.lazy_chains import largest_visit, most_visited
from mcpo.losses import reaches_pool
from mcpo.pack import packed_length
from mcpo.policy import logits_mb
from mcpo.records import TokenizedGroup
from mcpo.reference import resolved_kind
from mcpo_kernels.integrations.transformers import checkpointed_layers

# Of a float32 parameter that is not trained.
BYTES_FROZEN = 4
# Of the casts of a parameter, which the modes hold that keep the results of products.
BYTES_PER_CAST = 2
# The estimate of activations is right to a factor of two, by test.
SAFETY = 2
# Of a row with gradient, "light" computes again what is not a product, about a tenth of the work
# that it saves in a row without.
MOST_WITH_GRADIENT = 0.9


class Recompute(NamedTuple):
    """A mode and why it is the one."""

    mode: str
    reason: str


def resolve_recompute(
    config: Config,
    groups: Sequence[TokenizedGroup],
    model: PreTrainedModel,
    memory: int,
    *,
    packs: bool = True,
    state: float | None = None,
) -> Recompute:
    """The mode of a run, and why.

    Args:
        config: what is asked for.
        groups: those trained on.
        model: to be trained, or one like it on the device "meta".
        memory: bytes of the device, for one process; not what happens to be free, so that a
            resumed run resolves alike.
        packs: whether the model takes packed rows. If not, ``config`` shares no prompts either,
            and there are two modes: "none", and "full" by transformers' own means.
        state: ``state_bytes`` of the run; None: of one process with whole weights.

    Raises:
        ValueError: a mode is given that the model does not have.
    """
    asked = asked_mode(config.model)
    if not packs:
        return _resolve_plain(asked, config, groups, model, memory, state)
    if asked != "auto":
        return Recompute(asked, "it was given")
    try:
        checkpointed_layers(model)
    except ValueError as error:
        return Recompute("none", f"auto: {error}")
    kernel = config.kernel
    drawn = kernel.num_negatives
    if reaches_pool(config.loss):
        drawn = max(group.num_candidates for group in groups)
    share = share_with_gradient(
        groups,
        drawn,
        config.model.shares_prefixes,
        num_scored=most_visited(kernel) if kernel.scoring == "lazy" else None,
    )
    plenty = "none" if share > MOST_WITH_GRADIENT else "light"
    fits, sizes = _fits(plenty, config, groups, model, memory, state)
    if not fits:
        return Recompute("selective", f"auto: {plenty!r} does not fit, {sizes}")
    return Recompute(plenty, f"auto: {share:.0%} of the tokens have a gradient, {sizes}")


def _resolve_plain(
    asked: str,
    config: Config,
    groups: Sequence[TokenizedGroup],
    model: PreTrainedModel,
    memory: int,
    state: float | None,
) -> Recompute:
    """Of a model that takes one sequence per row."""
    able = model.supports_gradient_checkpointing
    if asked == "none":
        return Recompute("none", "it was given")
    if asked != "auto":
        if not able:
            raise ValueError(
                "a model that is not packed must support transformers' activation checkpointing "
                f"to be recomputed, got recompute {asked!r} and {type(model).__name__}, which does "
                "not; train it with recompute: none"
            )
        reason = f"{asked!r} was given, and one sequence per row leaves no rows to choose among"
        return Recompute("full", reason)
    fits, sizes = _fits("none", config, groups, model, memory, state)
    if fits or not able:
        return Recompute("none", f"auto: one sequence per row, {sizes}")
    return Recompute("full", f"auto: 'none' does not fit, {sizes}")


def _fits(
    mode: str,
    config: Config,
    groups: Sequence[TokenizedGroup],
    model: PreTrainedModel,
    memory: int,
    state: float | None,
) -> tuple[bool, str]:
    """Whether the memory is enough for a mode, and what is needed of it."""
    if state is None:
        state = state_bytes(config, model)
    tokens = largest_micro_batch(config, groups)
    needed = state + SAFETY * activation_bytes(model.config, tokens, mode)
    if mode in ("none", "light"):
        needed += model.num_parameters() * BYTES_PER_CAST
    needed += int(logits_mb(mode) * 2**20)
    return needed <= memory, f"{needed / 1e9:.1f} of {memory / 1e9:.1f} GB needed at most"


def state_bytes(
    config: Config, model: PreTrainedModel, engine: str = "single", num_ranks: int = 1
) -> float:
    """What a process holds of weights, gradients and moments, and of a reference that is a copy."""
    every = model.num_parameters()
    trained = model.num_parameters(only_trainable=True)
    copied = 0 if config.adapter.adapts or resolved_kind(config) != "live" else every
    return bytes_per_parameter(config.scale, engine, num_ranks) * trained + BYTES_FROZEN * (
        every - trained + copied
    )


def asked_mode(config: ModelConfig) -> str:
    """The mode that is asked for under either name, or "auto"."""
    if config.gradient_checkpointing is None:
        return config.recompute
    return "selective" if config.gradient_checkpointing else "none"


def largest_micro_batch(config: Config, groups: Sequence[TokenizedGroup]) -> int:
    """Packed tokens of the largest micro-batch there can be."""
    tokens = sorted(
        packed_length(largest_visit(group, config.kernel), config.model.shares_prefixes)
        for group in groups
    )
    return min(
        max(config.optim.max_tokens_per_micro_batch, tokens[-1]),
        sum(tokens[-config.optim.per_device_train_batch_size :]),
    )


def share_with_gradient(
    groups: Sequence[TokenizedGroup],
    num_negatives: int,
    share_prefix: bool,
    *,
    num_scored: int | None = None,
) -> float:
    """Of the packed tokens, those of prompts, chosen and drawn candidates, were draws uniform.

    ``num_scored`` is how many of a pool are packed; None for all.
    """
    every = (
        sum(packed_length(group, share_prefix) for group in groups)
        if num_scored is None
        else sum(_tokens_with_gradient(group, num_scored, share_prefix) for group in groups)
    )
    return (
        sum(_tokens_with_gradient(group, num_negatives, share_prefix) for group in groups) / every
    )


def _tokens_with_gradient(group: TokenizedGroup, num_negatives: int, share_prefix: bool) -> float:
    pool = [len(ids) - 1 for ids in group.candidate_ids[1:]]
    drawn = min(num_negatives, len(pool))
    prompts = 1 if share_prefix else 1 + drawn
    chosen = len(group.candidate_ids[0]) - 1
    return prompts * len(group.prompt_ids) + chosen + drawn * sum(pool) / len(pool)


def activation_bytes(config: PretrainedConfig, num_tokens: int, mode: str) -> int:
    """Rough bytes kept for the backward of a micro-batch of a Llama-like model.

    Per token and layer: four vectors of the residual stream and its norms in float32; queries,
    keys, values and attention output, and four of the feed-forward width, in two bytes each. With
    recompute a layer keeps its input, "light" the results of its seven linear layers and of
    attention too, and one layer at a time all of it.
    """
    text = config.get_text_config()
    hidden, layers = text.hidden_size, text.num_hidden_layers
    wide = getattr(text, "intermediate_size", None) or 4 * hidden
    inside = 4 * 4 * hidden + 2 * 4 * hidden + 2 * 4 * wide
    if mode == "none":
        return num_tokens * inside * layers
    products = 2 * (6 * hidden + 2 * wide) if mode == "light" else 0
    return num_tokens * ((4 * hidden + products) * layers + inside)


def device_memory(device: torch.device, processes: int) -> int:
    """Bytes of the device for each of ``processes`` that share it: of a GPU, one has it all."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    allowed = limit.read_text().strip() if limit.is_file() else "max"
    return min(machine, machine if allowed == "max" else int(allowed)) // processes
