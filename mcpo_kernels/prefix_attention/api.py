"""Attention over packed segments, where a segment also sees its ancestors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mcpo_kernels.prefix_attention import flash, flex, reference, sdpa, varlen
from mcpo_kernels.prefix_attention.choose import AttentionImpl, resolve_attention
from mcpo_kernels.prefix_attention.scores import ScoreRule

if TYPE_CHECKING:
    from torch import Tensor

    from mcpo_kernels.prefix_attention.layout import PrefixLayout


# One more argument than the house limit: the attention of today's models has this many knobs.
def prefix_attention(  # noqa: PLR0913
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: PrefixLayout,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    impl: AttentionImpl | str = AttentionImpl.AUTO,
) -> Tensor:
    """Causal attention of every token to its own segment and to all of its segment's ancestors.

    ``softmax(softcap(scale * query @ key.T)) @ value``, ``softcap(z) = c * tanh(z / c)``. Exact: a
    segment gets what it would get in an ordinary sequence after its ancestors. Autocast does not
    reach in.

    Heads come first, as in transformers ([1, H, T, D] without the batch); strides are free, so the
    [T, H, D] that projections and flash-attn use is a transposed view and costs nothing.

    Args:
        query: [H, T, D], packed tokens in the order of ``layout``.
        key: [Hkv, T, D], Hkv dividing H; query head h reads key head h // (H / Hkv).
        value: [Hkv, T, E]; E may differ from D.
        layout: the segments, T tokens in all.
        scale: None for D ** -0.5.
        window: keys a token sees along its chain of ancestors, itself included; None for all.
        softcap: c, > 0.
        sinks: [H] logit per head of a key without value that takes part in the softmax.
        impl: see ``AttentionImpl``. An explicit choice never falls back.

    Returns:
        [H, T, E] in the dtype of ``query``.

    Raises:
        ValueError: a shape, device or value does not fit, or there is no such ``impl``.
        RuntimeError: the implementation asked for cannot run here.
        TypeError: dtypes differ.
    """
    _check_tensors(query, key, value, sinks)
    if query.shape[1] != layout.num_tokens:
        raise ValueError(
            f"layout must have as many tokens as query, got {layout.num_tokens} and "
            f"{query.shape[1]}; every packed token belongs to one segment"
        )
    if window is not None and window < 1:
        raise ValueError(f"window must be >= 1, or None to see all, got {window}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be > 0, or None for no cap, got {softcap}")
    rule = ScoreRule(query.shape[2] ** -0.5 if scale is None else scale, window, softcap, sinks)
    chosen = resolve_attention(impl, query.device, query.dtype, rule)
    tensors = (query, key, value)
    # Autocast would round the scores that an explicit softmax wants in float32.
    with torch.autocast(query.device.type, enabled=False):
        if chosen.impl is AttentionImpl.FLASH:
            return flash.attend(*tensors, layout, rule, chosen.package)
        return IMPLEMENTATIONS[chosen.impl](*tensors, layout, rule)


IMPLEMENTATIONS = {
    AttentionImpl.REFERENCE: reference.attend,
    AttentionImpl.SDPA: sdpa.attend,
    AttentionImpl.VARLEN: varlen.attend,
    AttentionImpl.FLEX: flex.attend,
}


def _check_tensors(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None) -> None:
    shapes = f"{list(query.shape)}, {list(key.shape)} and {list(value.shape)}"
    if not query.ndim == key.ndim == value.ndim == 3:
        raise ValueError(
            f"query, key and value must be [H, T, D], [Hkv, T, D] and [Hkv, T, E], got {shapes}; "
            "for [1, H, T, D] pass query[0], key[0] and value[0]"
        )
    same_tokens = query.shape[1] == key.shape[1] == value.shape[1]
    if not same_tokens or query.shape[2] != key.shape[2] or key.shape[0] != value.shape[0]:
        raise ValueError(
            f"query, key and value must be [H, T, D], [Hkv, T, D] and [Hkv, T, E], got {shapes}"
        )
    if key.shape[0] == 0 or query.shape[0] % key.shape[0]:
        raise ValueError(
            f"the number of key heads must divide that of query heads, got {key.shape[0]} and "
            f"{query.shape[0]}"
        )
    if sinks is not None and sinks.shape != query.shape[:1]:
        raise ValueError(f"sinks must be [H = {query.shape[0]}], got {list(sinks.shape)}")
    if not query.dtype == key.dtype == value.dtype:
        raise TypeError(
            "query, key and value must have one dtype, got "
            f"{query.dtype}, {key.dtype} and {value.dtype}"
        )
    if not query.device == key.device == value.device:
        raise ValueError(
            "query, key and value must be on one device, got "
            f"{query.device}, {key.device} and {value.device}"
        )
