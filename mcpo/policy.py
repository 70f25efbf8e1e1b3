"""Stages 4 and 5: an unmodified Hugging Face causal LM that scores packed batches.

The body runs on the packed tokens; only the hidden states of scored rows reach the head, and the
head is fused with the log-softmax, so no [tokens, vocabulary] tensor exists. Everything happens
inside ``Policy.forward``: DDP, FSDP2 and ZeRO hook that call, and a weight taken from outside it
may be a shard, a stale view, or miss its gradient reduction.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from mcpo.records import PackedBatch
from mcpo_kernels import SelectiveRecompute, sequence_logprobs
from mcpo_kernels.integrations.transformers import (
    ATTENTION_NAME,
    checkpointed_layers,
    packed,
    register,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadScaling:
    """What a model does to its logits after the matrix product."""

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, config: Any) -> HeadScaling:
        """Read the names that transformers' models use for it."""
        text_config = config.get_text_config()
        scale = 1.0
        if getattr(text_config, "logits_scaling", None):
            # Granite divides its logits.
            scale = 1.0 / text_config.logits_scaling
        if getattr(text_config, "logit_scale", None):
            # Cohere multiplies them.
            scale = float(text_config.logit_scale)
        return cls(scale=scale, softcap=getattr(text_config, "final_logit_softcapping", None))


class ScoringHead(nn.Linear):
    """The model's own output projection, which given targets returns log-probabilities instead of
    logits.

    The op runs in a module's forward, because that call is what the sharded engines hook to gather
    the weight.
    """

    def __init__(self, linear: nn.Linear, scaling: HeadScaling, impl: str) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight = linear.weight
        self.bias = linear.bias
        self.scaling = scaling
        self.impl = impl

    def forward(self, input: Tensor, batch: PackedBatch | None = None) -> Tensor:
        """Logits of ``input``, or the [S] summed log-probabilities of ``batch``'s targets."""
        if batch is None:
            return F.linear(input, self.weight, self.bias)
        dtype = _compute_dtype(input)
        return sequence_logprobs(
            input.to(dtype),
            self.weight.to(dtype),
            batch.target_N,
            batch.seq_of_N,
            batch.num_seqs,
            bias=self._bias_to(dtype),
            softcap=self.scaling.softcap,
            scale=self.scaling.scale,
            impl=self.impl,
        )

    def _bias_to(self, dtype: torch.dtype) -> Tensor | None:
        # torch types the attribute ``bias`` of a Linear as always there.
        bias = self._parameters["bias"]
        return None if bias is None else bias.to(dtype)


class Policy(nn.Module):
    """A causal LM in packed form; the module that an engine wraps.

    Args:
        model: any Hugging Face causal LM whose attention goes through transformers' interface; its
            attention implementation and its output projection's class are set, its weights and code
            are not touched. Dropout is switched off: scoring and training must be one computation.
        head_impl: implementation of the fused head.
        autocast_dtype: dtype of the matrix products, or None for that of the weights.
        recompute: "none", "light", "selective" or "full", see ``mcpo.recompute``.

    Raises:
        ValueError: the model has no linear output projection to fuse, attention of its own that
            cannot be set, or no layers that can be recomputed.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        head_impl: str,
        autocast_dtype: torch.dtype | None,
        recompute: str = "none",
    ) -> None:
        super().__init__()
        register()
        projection = model.get_output_embeddings()
        if not isinstance(projection, nn.Linear):
            raise ValueError(
                "the model must end in a linear output projection to be scored, got "
                f"{type(projection).__name__} in {type(model).__name__}"
            )
        self.plain_attention = _attention_of(model) or "eager"
        model.set_attn_implementation(ATTENTION_NAME)
        if _attention_of(model) != ATTENTION_NAME:
            # transformers only logs a warning, and the model would ignore the packed layout.
            raise ValueError(
                "the model's attention must go through transformers' AttentionInterface to be "
                f"packed, and that of {type(model).__name__} stayed {_attention_of(model)!r} when "
                f"set to {ATTENTION_NAME!r}; use a model whose attention can be set, such as "
                "Llama, Qwen, Gemma or Phi"
            )
        scaling = HeadScaling.of(model.config)
        model.set_output_embeddings(ScoringHead(projection, scaling, head_impl))
        disable_dropout(model)
        self.model = model
        self.autocast_dtype = autocast_dtype
        self.recompute = recompute
        # Modules in a list that are no children of this one: they are the model's.
        self._layers = () if recompute == "none" else checkpointed_layers(model)

    def recompute_of(self, batch: PackedBatch) -> SelectiveRecompute | None:
        """For one forward with gradients: what to call the policy with, besides the batch."""
        if self.recompute == "none":
            return None
        return SelectiveRecompute(
            self._layers, batch.layout, keep_products=self.recompute == "light"
        )

    def forward(self, batch: PackedBatch, recompute: SelectiveRecompute | None = None) -> Tensor:
        """[S] float32 summed log-probability of each candidate (stages 4 and 5).

        With ``recompute`` the caller says in it, before the backward, which segments the loss
        depends on.
        """
        device_type = batch.token_T.device.type
        with torch.autocast(
            device_type, dtype=self.autocast_dtype, enabled=self.autocast_dtype is not None
        ):
            with nullcontext() if recompute is None else recompute.recording():
                hidden_ND = self.scored_hidden(batch)
            head = self.model.get_output_embeddings()
            assert isinstance(head, ScoringHead)
            return head(hidden_ND, batch)

    def scored_hidden(self, batch: PackedBatch) -> Tensor:
        """[N, D] final hidden states of the scored rows."""
        with packed(batch.layout):
            output = self.model.base_model(
                input_ids=batch.token_T[None],
                position_ids=batch.position_T[None],
                use_cache=False,
            )
        return output.last_hidden_state[0].index_select(0, batch.scored_N)


@contextmanager
def unpacked(policy: Policy) -> Generator[PreTrainedModel]:
    """The model with its own attention, for plain forwards and ``generate``."""
    policy.model.set_attn_implementation(policy.plain_attention)
    try:
        yield policy.model
    finally:
        policy.model.set_attn_implementation(ATTENTION_NAME)


def group_logps(logp_S: Tensor, batch: PackedBatch) -> Tensor:
    """[P, C] the log-probabilities of each prompt's candidates; 0 where there is none."""
    logp_PC = logp_S[batch.seq_of_PC.reshape(-1)].view(batch.seq_of_PC.shape)
    return logp_PC.masked_fill(~batch.mask_PC, 0.0)


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability to 0, in modules and where attention layers read it."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "attn_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def _attention_of(model: PreTrainedModel) -> str | None:
    """The attention of the layers that read text; of a multimodal model others may differ."""
    # There is no public name for it.
    return getattr(model.config.get_text_config(), "_attn_implementation", None)


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    """The autocast dtype where autocast is on, else the dtype of the hidden states."""
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return hidden.dtype
