"""Batched generation with a Hugging Face causal LM: greedy for evaluation, sampled for making data.

A prompt is read once, however many completions are drawn from it, and a row that has ended leaves
the batch, so that short completions do not wait for long ones. Sampling inverts the cumulative
distribution at uniform numbers that belong to the draw, not to the batch: a draw meets the same
random numbers in whatever company it is generated, and the same batch gives the same text. In
another batch the padding differs, and with it the rounding of the logits, so a text may then part
from its twin at a near tie.
"""

# B rows of the batch, L tokens so far, V vocabulary

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import DynamicCache

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from mcpo.encode import Encoder


@dataclass(frozen=True, kw_only=True, slots=True)
class Draw:
    """How one completion of a prompt is drawn."""

    temperature: float = 0.0
    """0 takes the most likely token each time."""
    seed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """What the model wrote."""

    text: str
    """Without special tokens and surrounding blanks."""
    num_tokens: int
    """With the one that ended it."""
    finished: bool
    """False if it was cut at the token limit."""


GREEDY = Draw()


def greedy(
    model: PreTrainedModel,
    encoder: Encoder,
    prompt_ids: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    on_progress: Callable[[int], None] | None = None,
) -> list[Completion]:
    """The most likely continuation of each prompt, token by token.

    Args:
        model: a causal LM; its attention implementation must know key-value caches ("sdpa").
        encoder: of its tokenizer: how a text is written out, and what ends an answer.
        prompt_ids: from ``encode.encode_prompt``.
        max_new_tokens: at which a completion is cut.
        batch_size: prompts per batch; prompts of like length are batched together.
        on_progress: called with the number of prompts done after each batch.
    """
    by_length = sorted(range(len(prompt_ids)), key=lambda index: len(prompt_ids[index]))
    completions: dict[int, Completion] = {}
    for start in range(0, len(by_length), batch_size):
        batch = by_length[start : start + batch_size]
        drawn = generate_batch(
            model,
            encoder,
            [prompt_ids[index] for index in batch],
            [(GREEDY,)] * len(batch),
            max_new_tokens=max_new_tokens,
        )
        completions.update({index: group[0] for index, group in zip(batch, drawn, strict=True)})
        if on_progress is not None:
            on_progress(len(batch))
    return [completions[index] for index in range(len(prompt_ids))]


# Not inference_mode: weights that a sharded engine gathers in it could not be trained afterwards.
@torch.no_grad()
def generate_batch(
    model: PreTrainedModel,
    encoder: Encoder,
    prompt_ids: Sequence[Sequence[int]],
    draws: Sequence[Sequence[Draw]],
    *,
    max_new_tokens: int,
) -> list[list[Completion]]:
    """Complete every prompt once per draw; all prompts have the same number of draws."""
    num_draws = len(draws[0])
    if any(len(group) != num_draws for group in draws):
        counts = sorted({len(group) for group in draws})
        raise ValueError(
            f"every prompt of a batch must have the same number of draws; got {counts}"
        )
    flat = [draw for group in draws for draw in group]
    ends = _end_ids(model, encoder)
    tokens = _decode(model, prompt_ids, flat, ends=ends, max_new_tokens=max_new_tokens)
    completions = [
        Completion(
            text=str(encoder.tokenizer.decode(ids, skip_special_tokens=True)).strip(),
            num_tokens=len(ids),
            finished=ids[-1] in ends,
        )
        for ids in tokens
    ]
    return [completions[i : i + num_draws] for i in range(0, len(flat), num_draws)]


def _decode(
    model: PreTrainedModel,
    prompt_ids: Sequence[Sequence[int]],
    draws: Sequence[Draw],
    *,
    ends: frozenset[int],
    max_new_tokens: int,
) -> list[list[int]]:
    """The new token ids of each draw, the ending one included."""
    num_draws = len(draws) // len(prompt_ids)
    token_BL, mask_BL = _pad_left(prompt_ids, model.device)
    cache = DynamicCache()
    logits_BV = _next_logits(model, token_BL, mask_BL, cache).repeat_interleave(num_draws, dim=0)
    cache.batch_repeat_interleave(num_draws)
    mask_BL = mask_BL.repeat_interleave(num_draws, dim=0)
    temperature_B = torch.tensor([draw.temperature for draw in draws], device=model.device)
    uniform_BL = _uniforms(draws, max_new_tokens).to(model.device)

    written: list[list[int]] = [[] for _ in draws]
    running = list(range(len(draws)))
    for step in range(max_new_tokens):
        next_B = pick_tokens(logits_BV, temperature_B[running], uniform_BL[running, step])
        for row, token in zip(running, next_B.tolist(), strict=True):
            written[row].append(token)
        keep = [i for i, row in enumerate(running) if written[row][-1] not in ends]
        if not keep or step + 1 == max_new_tokens:
            break
        if len(keep) < len(running):
            keep_B = torch.tensor(keep, device=model.device)
            cache.batch_select_indices(keep_B)
            mask_BL, next_B = mask_BL[keep_B], next_B[keep_B]
            running = [running[i] for i in keep]
        mask_BL = torch.cat((mask_BL, mask_BL.new_ones(len(running), 1)), dim=1)
        logits_BV = _next_logits(model, next_B[:, None], mask_BL, cache)
    return written


def pick_tokens(logits_BV: Tensor, temperature_B: Tensor, uniform_B: Tensor) -> Tensor:
    """The token where the cumulative distribution passes ``uniform_B``; the likeliest at 0."""
    likeliest_B = logits_BV.argmax(dim=-1)
    if not bool((temperature_B > 0).any()):
        return likeliest_B
    scaled_BV = logits_BV.float() / temperature_B.clamp_min(1e-3)[:, None]
    cumulative_BV = scaled_BV.softmax(dim=-1).cumsum(dim=-1)
    # Rounding leaves the last entry a little off 1, so the uniform number is taken relative to it.
    target_B1 = uniform_B[:, None] * cumulative_BV[:, -1:]
    sampled_B = torch.searchsorted(cumulative_BV, target_B1, right=True).squeeze(-1)
    sampled_B = sampled_B.clamp_max(logits_BV.shape[-1] - 1)
    return torch.where(temperature_B > 0, sampled_B, likeliest_B)


def _next_logits(
    model: PreTrainedModel, token_BL: Tensor, mask_BL: Tensor, cache: DynamicCache
) -> Tensor:
    """Logits after the last token of each row; the cache grows by the tokens given."""
    position_BL = (mask_BL.cumsum(dim=1) - 1).clamp_min(0)[:, -token_BL.shape[1] :]
    output = model(
        input_ids=token_BL,
        attention_mask=mask_BL,
        position_ids=position_BL,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return output.logits[:, -1]


def _pad_left(prompt_ids: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, [B, L] each; any id will do for padding, none attends to it."""
    width = max(len(ids) for ids in prompt_ids)
    tokens = [[0] * (width - len(ids)) + list(ids) for ids in prompt_ids]
    mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompt_ids]
    return torch.tensor(tokens, device=device), torch.tensor(mask, device=device)


def _uniforms(draws: Sequence[Draw], num_tokens: int) -> Tensor:
    """[B, L] numbers in [0, 1), a row of its own for every draw, drawn on the CPU."""
    rows = [
        torch.rand(num_tokens, generator=torch.Generator().manual_seed(draw.seed)) for draw in draws
    ]
    return torch.stack(rows)


def _end_ids(model: PreTrainedModel, encoder: Encoder) -> frozenset[int]:
    """What ends an answer in training, by the tokenizer, or by the model's generation settings."""
    configured: Any = getattr(model.generation_config, "eos_token_id", None)
    last: Any = encoder.tokenizer.eos_token_id
    listed: list[Any] = configured if isinstance(configured, list) else [configured]
    return frozenset(int(end) for end in (*listed, last, encoder.end_id) if end is not None)
