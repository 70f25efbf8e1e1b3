"""Prefix attention for models of transformers, chosen by name like any other attention.

    register()
    model.set_attn_implementation(ATTENTION_NAME)
    with packed(layout):
        model(input_ids=token_T[None], position_ids=position_T[None], use_cache=False)

The model asks the mask function registered under the name for each kind of mask it uses. That
function answers with a ``PackedMask``, which the model hands to its layers as their attention mask.
So every layer knows the layout and the window it really asked for, also when a checkpointed layer
runs again in the backward, where the context is gone. What is neither causal nor a sliding window
is refused. Layers that mix tokens without calling an attention function (linear attention,
convolutions, state spaces) are not seen from here: such models must not be packed.
"""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_layers import GradientCheckpointingLayer

from mcpo_kernels.prefix_attention.api import prefix_attention
from mcpo_kernels.prefix_attention.layout import PackedMask, PrefixLayout

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from torch import Tensor

ATTENTION_NAME = "mcpo_prefix"

_layout: ContextVar[PrefixLayout | None] = ContextVar("mcpo_prefix_layout", default=None)


def register() -> None:
    """Make ``ATTENTION_NAME`` known to transformers; again does no harm."""
    AttentionInterface.register(ATTENTION_NAME, attention)
    AttentionMaskInterface.register(ATTENTION_NAME, packed_mask)


@contextmanager
def packed(layout: PrefixLayout) -> Generator[None]:
    """Forward passes inside read their single row of tokens by this layout."""
    token = _layout.set(layout)
    try:
        yield
    finally:
        _layout.reset(token)


def checkpointed_layers(model: torch.nn.Module) -> tuple[torch.nn.Module, ...]:
    """The layers of a model that ask for checkpointing, for ``SelectiveRecompute``.

    Raises:
        ValueError: there is none.
    """
    layers = tuple(
        module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)
    )
    if not layers:
        raise ValueError(
            f"the layers of {type(model).__name__} must be transformers' "
            "GradientCheckpointingLayers to be recomputed, and it has none; train it without "
            "recompute"
        )
    return layers


def packed_mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Any],
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    **options: Any,
) -> PackedMask:
    """The mask a model asks for, told by its layout and window.

    Raises:
        RuntimeError: there is no layout.
        ValueError: the input does not fit the layout.
        NotImplementedError: the model asks for another mask than a causal or sliding-window one.
    """
    layout = _layout.get()
    if layout is None:
        raise RuntimeError(
            f"{ATTENTION_NAME!r} attention needs a layout; call the model inside "
            "`with packed(layout):`"
        )
    if attention_mask is not None:
        raise ValueError(
            "a packed row has no padding, so attention_mask must be None; drop it from the call"
        )
    if batch_size != 1 or not q_length == kv_length == layout.num_tokens:
        raise ValueError(
            f"packed input must be one row of the layout's {layout.num_tokens} tokens without a "
            f"cache, got {batch_size} rows, {q_length} queries and {kv_length} keys"
        )
    # A mask to be mapped over scalars is one the model made up itself.
    custom = bool(options.get("use_vmap"))
    chunk = getattr(options.get("config"), "attention_chunk_size", None)
    chunked = local_size is not None and local_size == chunk
    device = torch.device(options.get("device") or "cpu")
    if custom or chunked or not _is_causal(mask_function, layout, local_size, device):
        raise NotImplementedError(
            "the model asks for an attention mask that is neither causal nor a sliding window "
            f"(local_size={local_size}), or position_ids do not count up by one within the "
            f"segments of the layout; {ATTENTION_NAME!r} cannot serve it: use 'sdpa' and one "
            "sequence per row"
        )
    return PackedMask(layout, local_size)


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer: [1, H, T, D] in, [1, T, H, E] out, as transformers wants it.

    Raises:
        TypeError: the mask is not a ``PackedMask``.
        NotImplementedError: dropout, a position bias or attention to the future is asked for.
    """
    if not isinstance(attention_mask, PackedMask):
        raise TypeError(
            f"{type(module).__name__} passed {type(attention_mask).__name__} as its attention "
            f"mask where {ATTENTION_NAME!r} expects a PackedMask: this model builds its masks by "
            "itself; use 'sdpa' and one sequence per row"
        )
    if options.get("dropout"):
        raise NotImplementedError(
            f"attention dropout must be 0, got {options['dropout']}: tokens that share a prefix "
            "would share its dropout mask; set attention_dropout=0 in the model's config"
        )
    if options.get("position_bias") is not None or options.get("is_causal") is False:
        raise NotImplementedError(
            f"{type(module).__name__} asks for a position bias or for attention to the future, "
            f"which {ATTENTION_NAME!r} does not have; use 'sdpa' and one sequence per row"
        )
    query, key, value = _one_dtype(query, key, value)
    output_HTE = prefix_attention(
        query[0],
        key[0],
        value[0],
        attention_mask.layout,
        scale=options.get("scaling"),
        window=attention_mask.window,
        softcap=options.get("softcap"),
        sinks=options.get("s_aux"),
    )
    return output_HTE.transpose(0, 1)[None].contiguous(), None


def _one_dtype(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What autocast does before torch's own attention: rotary embeddings leave float32 behind."""
    if not torch.is_autocast_enabled(query.device.type):
        return query, key, value
    dtype = torch.get_autocast_dtype(query.device.type)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def _is_causal(
    mask_function: Callable[..., Any],
    layout: PrefixLayout,
    window: int | None,
    device: torch.device,
) -> bool:
    """Whether the mask function agrees with the layout wherever a deviation would show.

    Asks for pairs of tokens within a segment: neighbours in both directions, the two sides of the
    window's edge, and the segment's first token. That is a few pairs per token; the comparison
    waits for the device once.
    """
    lengths = torch.tensor(layout.lengths, device=device)
    token_T = torch.arange(layout.num_tokens, device=device)
    first_T = torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
    distances = (0, 1) if window is None else (0, 1, window - 1, window)
    earlier = [torch.maximum(token_T - distance, first_T) for distance in distances]
    early_M = torch.cat([*earlier, first_T])
    late_M = token_T.repeat(len(earlier) + 1)
    query_M, key_M = torch.cat([late_M, early_M]), torch.cat([early_M, late_M])
    wanted_M = key_M <= query_M
    if window is not None:
        wanted_M &= query_M - key_M < window
    row_M = torch.zeros_like(query_M)
    asked_M = torch.as_tensor(mask_function(row_M, row_M, query_M, key_M), device=device)
    return torch.equal(asked_M.expand_as(wanted_M), wanted_M)
