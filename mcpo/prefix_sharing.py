"""Whether a run packs, and shares prompts: asked of the model at hand before anything is scored."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from rich.console import Console
from transformers import PreTrainedModel

from mcpo.config import Config
from mcpo.engine import Engine
from mcpo.placement import Placement
from mcpo.policy import Policy
from mcpo.records import TokenizedGroup
from mcpo.self_check import check_packing
from mcpo_kernels.integrations.packable import longest_span, probe
from mcpo_kernels.prefix_attention.mask import UnpackableError

# Of the made-up group: every kind of segment, and tokens beyond a window as far as that is cheap.
MADE_UP_PROMPT, MADE_UP_CANDIDATES = 8, (9, 5)
MOST_MADE_UP_TOKENS = 512


def make_policy(
    model: PreTrainedModel, config: Config, placement: Placement
) -> tuple[Policy, str | None]:
    """The policy, and why it does not pack; None if it does, as far as the model declares.

    Raises:
        ValueError: the model cannot be trained, or not with its prompts shared as is asked for.
    """
    make = partial(
        Policy,
        model,
        head_impl=config.model.head_impl,
        autocast_dtype=placement.autocast_dtype,
        attention_impl=config.model.attention_impl,
    )
    try:
        return make(), None
    except UnpackableError as error:
        refuse_if_asked_for(config, str(error))
        return make(packs=False), str(error)


def settle(
    engine: Engine,
    groups: Sequence[TokenizedGroup],
    config: Config,
    console: Console,
    reason: str | None,
) -> tuple[Config, float]:
    """Check the packed forward, or else the plain one, against the model's own; say which it is.

    Args:
        engine: its policy is told to stop packing where that is the outcome, on every rank.
        groups: to check with, unless ``self_check`` is off: then made-up tokens alone are.
        config: of the run.
        console: for one line.
        reason: why the policy does not pack, if that is known already.

    Returns:
        The configuration with ``prefix_sharing`` as it came out, and the rounding that
        ``check_packing`` measured.

    Raises:
        ValueError: the model's log-probabilities are not its own either way, or not with its
            prompts shared as is asked for.
    """
    policy = engine.policy
    rounding = 0.0
    if reason is None:
        share = config.model.shares_prefixes
        reason, rounding = _checked(policy, groups, config, share_prefix=share)
        # Ranks must agree, and a message of one of them says enough.
        reason = next((each for each in engine.gather(reason) if each is not None), None)
    if reason is None:
        how = "packed, prompts shared" if config.model.shares_prefixes else "packed, nothing shared"
        console.print(f"prefix_sharing: {config.model.prefix_sharing}: {how}", soft_wrap=True)
        return config, rounding
    refuse_if_asked_for(config, reason)
    if engine.lockstep:
        raise ValueError(
            "an engine that shards weights needs a model that can be packed, because its ranks "
            f"must make the same number of forwards: {reason}; use engine: ddp"
        )
    console.print(
        f"prefix_sharing: {config.model.prefix_sharing}: one sequence per row, with the model's "
        f"own attention, because {reason}",
        soft_wrap=True,
    )
    if policy.packs:
        policy.stop_packing()
    failure, rounding = _checked(policy, groups, config, share_prefix=False)
    # As above: a rank that raises alone would leave the others waiting.
    failure = next((each for each in engine.gather(failure) if each is not None), None)
    if failure is not None:
        raise ValueError(failure)
    return replace(config, model=replace(config.model, prefix_sharing="off")), rounding


def _checked(
    policy: Policy, groups: Sequence[TokenizedGroup], config: Config, *, share_prefix: bool
) -> tuple[str | None, float]:
    """What speaks against this way of batching, and the rounding found."""
    try:
        if policy.packs:
            probe(policy.model)
        rounding = check_packing(policy, [made_up_group(policy)], share_prefix=share_prefix)
        if config.run.self_check:
            rounding = check_packing(policy, groups, share_prefix=share_prefix)
    except (UnpackableError, ValueError) as error:
        return str(error), 0.0
    return None, rounding


def made_up_group(policy: Policy) -> TokenizedGroup:
    """Random tokens; longer than the model's windows, up to ``MOST_MADE_UP_TOKENS``."""
    draw = random.Random(0)
    # Of a linear layer, with or without an adapter.
    num_vocab: int = getattr(policy.model.get_output_embeddings(), "out_features")  # noqa: B009
    most = min(longest_span(policy.model), MOST_MADE_UP_TOKENS)

    def ids(count: int) -> tuple[int, ...]:
        # The first tokens of a vocabulary are often instructions, such as padding.
        return tuple(draw.randrange(num_vocab // 2, num_vocab) for _ in range(count))

    return TokenizedGroup(
        row_id="made up",
        prompt_ids=ids(MADE_UP_PROMPT + most),
        candidate_ids=tuple(ids(count) for count in MADE_UP_CANDIDATES),
    )


def refuse_if_asked_for(config: Config, reason: str) -> None:
    """Raise if the configuration insists on sharing prompts, which ``reason`` speaks against."""
    if config.model.prefix_sharing == "on":
        raise ValueError(
            f"prefix_sharing: on needs a model that can be packed: {reason}. With auto it is "
            "trained one sequence per row"
        )
