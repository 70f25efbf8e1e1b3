"""Which models of transformers may be packed, asked before anything is trained.

A packed row is right for a model whose tokens meet in attention alone, in every layer, through
transformers' interface. Whatever else carries something from token to token (linear attention,
state spaces, convolutions, attention code of its own) runs over the borders of segments and gives
wrong numbers without an error. What a model declares is read first; then a few made-up tokens go
through it and every layer must have asked for its attention.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mcpo_kernels.integrations.transformers import (
    ATTENTION_NAME,
    PackedRow,
    UnpackableError,
    packed,
    register,
)
from mcpo_kernels.prefix_attention.layout import NO_PARENT, PrefixLayout

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Kinds of layers, as configurations name them, whose mask ``packed_mask`` can tell.
SERVED_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
# What configurations call the reach of a layer that does not see everything.
SPANS = (
    "sliding_window",
    "sliding_window_size",
    "attention_chunk_size",
    "attention_window",
    "window_size",
)
# A prompt and two candidates of a few tokens: every kind of segment there is.
PROBE = PrefixLayout((3, 2, 1), (NO_PARENT, 0, 0))


def use_packed_attention(model: PreTrainedModel) -> str:
    """Set the model's attention to ``ATTENTION_NAME``; returns the name of what it had.

    Raises:
        UnpackableError: what the model declares says that it cannot be packed; nothing was changed.
    """
    register()
    before = attention_of(model) or "eager"
    reason = declared_refusal(model)
    if reason is not None:
        raise UnpackableError(f"{type(model).__name__} cannot be packed: {reason}")
    model.set_attn_implementation(ATTENTION_NAME)
    if attention_of(model) != ATTENTION_NAME:
        # transformers only logs a warning, and the model would ignore the packed layout.
        raise UnpackableError(
            f"{type(model).__name__} cannot be packed: its attention must go through transformers' "
            f"AttentionInterface, and stayed {attention_of(model)!r} when set to "
            f"{ATTENTION_NAME!r}"
        )
    return before


def attention_of(model: PreTrainedModel) -> str | None:
    """The attention of the layers that read text; of a multimodal model others may differ."""
    # There is no public name for it.
    return getattr(_text_config(model), "_attn_implementation", None)


def declared_refusal(model: PreTrainedModel) -> str | None:
    """Why the model cannot be packed, as far as its configuration and modules say; None if not."""
    types = getattr(_text_config(model), "layer_types", None) or ()
    others = sorted(set(types) - SERVED_LAYER_TYPES)
    if others:
        return f"it has layers of the kind {', '.join(others)}"
    for name, module in text_decoder(model).named_modules():
        # A convolution along the tokens; that of patches or of audio is in no text decoder.
        if isinstance(module, nn.Conv1d):
            return f"its {name} is a convolution over neighbouring tokens"
    return None


@torch.no_grad()
def probe(model: PreTrainedModel) -> None:
    """Send six tokens through the body as a prompt and two candidates.

    Raises:
        UnpackableError: it does not get through, or a layer did not follow the layout.
    """
    device = next(model.parameters()).device
    position_T = torch.cat(
        [
            PROBE.prefix_length(segment) + torch.arange(length)
            for segment, length in enumerate(PROBE.lengths)
        ]
    )
    token_T = torch.arange(1, 1 + PROBE.num_tokens)
    inputs: dict[str, Any] = {
        "input_ids": token_T[None].to(device),
        "position_ids": position_T[None].to(device),
        "use_cache": False,
    }
    with packed(PROBE) as row:
        try:
            text_decoder(model)(**inputs)
        except UnpackableError as error:
            raise UnpackableError(f"{type(model).__name__} cannot be packed: {error}") from error
        # Whatever a model does with a mask it does not know, it raises some error of its own.
        except Exception as error:
            raise UnpackableError(
                f"{type(model).__name__} cannot be packed: on a packed row it raises "
                f"{type(error).__name__}: {error}"
            ) from error
    check_attended(model, row)


def check_attended(model: PreTrainedModel, row: PackedRow) -> None:
    """Every layer must have followed the layout of a forward, a layer being what the config counts.

    Raises:
        UnpackableError: there were more or fewer.
    """
    wanted = _text_config(model).num_hidden_layers
    if len(row.attended) != wanted:
        raise UnpackableError(
            f"{type(model).__name__} cannot be packed: it has {wanted} layers and "
            f"{len(row.attended)} of them attend through transformers' AttentionInterface; the "
            "others would run over the borders of segments"
        )


def longest_span(model: PreTrainedModel) -> int:
    """The most tokens that any window, chunk or block of the model holds; 0 where it has none."""
    config = _text_config(model)
    spans = [getattr(config, name, None) for name in SPANS]
    return max((span for span in spans if isinstance(span, int)), default=0)


def _text_config(model: PreTrainedModel) -> Any:
    return model.config.get_text_config(decoder=True)


def text_decoder(model: PreTrainedModel) -> nn.Module:
    """The part that turns tokens into hidden states: the model without its output projection."""
    # Where a class does not know its own, it names itself, or its projection.
    for part in (model.get_decoder(), model.base_model, getattr(model, "model", None)):
        if isinstance(part, nn.Module) and part is not model and not isinstance(part, nn.Linear):
            return part
    return model
