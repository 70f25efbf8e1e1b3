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

from mcpo.plain_rows import plain_hidden
from mcpo.records import PackedBatch
from mcpo_kernels import SelectiveRecompute, sequence_logprobs
from mcpo_kernels.integrations.packable import attention_of, text_decoder, use_packed_attention
from mcpo_kernels.integrations.transformers import ATTENTION_NAME, checkpointed_layers, packed

# Of "light", which keeps results of products: those of the head are kept for so many columns of the
# vocabulary as this allows, and made once more for the others.
LOGITS_MB = 256.0


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
        # Gemma's, RecurrentGemma's and xLSTM's names for one thing.
        names = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
        caps = (getattr(text_config, name, None) for name in names)
        return cls(scale=scale, softcap=next((cap for cap in caps if cap), None))


class ScoringHead(nn.Linear):
    """The model's own output projection, which given targets returns log-probabilities instead of
    logits.

    The op runs in a module's forward, because that call is what the sharded engines hook to gather
    the weight.
    """

    def __init__(self, linear: nn.Linear, scaling: HeadScaling, impl: str) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.cache_mb = 0.0
        """MiB of logits that a forward may keep for its backward."""
        self.weight = linear.weight
        self.bias = linear.bias
        self.scaling = scaling
        self.impl = impl

    def forward(self, input: Tensor, batch: PackedBatch | None = None) -> Tensor:
        """Logits of ``input``, or the [S] summed log-probabilities of ``batch``'s targets."""
        if batch is None:
            return F.linear(input, self.weight, self.bias)
        dtype = compute_dtype(input)
        return self.score(input.to(dtype), self.weight.to(dtype), batch)

    def score(self, hidden_ND: Tensor, weight_VD: Tensor, batch: PackedBatch) -> Tensor:
        """[S] the fused op with this head's bias, scaling and implementation."""
        return sequence_logprobs(
            hidden_ND,
            weight_VD,
            batch.target_N,
            batch.seq_of_N,
            batch.num_seqs,
            bias=self._bias_to(hidden_ND.dtype),
            softcap=self.scaling.softcap,
            scale=self.scaling.scale,
            cache_mb=self.cache_mb,
            impl=self.impl,
        )

    def _bias_to(self, dtype: torch.dtype) -> Tensor | None:
        # torch types the attribute ``bias`` of a Linear as always there.
        bias = self._parameters["bias"]
        return None if bias is None else bias.to(dtype)


class Policy(nn.Module):
    """A causal LM that scores packed batches; the module that an engine wraps.

    Args:
        model: any Hugging Face causal LM; its output projection's class is set and, where it packs,
            its attention implementation; its weights and code are not touched. Dropout is switched
            off: scoring and training must be one computation.
        head_impl: implementation of the fused head.
        autocast_dtype: dtype of the matrix products, or None for that of the weights.
        recompute: "none", "light", "selective" or "full", see ``mcpo.recompute``.
        attention_impl: implementation of prefix attention.
        packs: whether a batch is one row of tokens, for which the model's attention must go through
            transformers' interface. If not, its sequences are rows of their own, of which none may
            share a prefix, with the attention that the model has.

    Raises:
        ValueError: the model has no linear output projection to fuse, or no layers that can be
            recomputed.
        UnpackableError: it declares that it cannot be packed.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        head_impl: str,
        autocast_dtype: torch.dtype | None,
        recompute: str = "none",
        attention_impl: str = "auto",
        packs: bool = True,
    ) -> None:
        super().__init__()
        projection: Any = model.get_output_embeddings()
        # What an adapter of the head stands around, or the head itself.
        linear = getattr(projection, "base_layer", projection)
        if not isinstance(linear, nn.Linear):
            raise ValueError(
                "the model must end in a linear output projection to be scored, got "
                f"{type(projection).__name__} in {type(model).__name__}"
            )
        self.packs = packs
        self.attention_impl = attention_impl
        self.plain_attention = (
            use_packed_attention(model) if packs else attention_of(model) or "eager"
        )
        head: nn.Module = ScoringHead(linear, HeadScaling.of(model.config), head_impl)
        if linear is not projection:
            # It needs peft, which is there if there are adapters.
            from mcpo.adapted_head import AdaptedHead

            head = AdaptedHead.of(projection, head)
        model.set_output_embeddings(head)
        disable_dropout(model)
        self.model = model
        self.autocast_dtype = autocast_dtype
        # Modules in a tuple are no children of this one: they are the model's.
        self._layers: tuple[nn.Module, ...] = ()
        self.set_recompute(recompute)

    def set_recompute(self, mode: str) -> None:
        """What the backward computes again from now on.

        A model that does not pack has no rows to choose among: whatever the mode, unless it is
        "none", the model replays all of them, as transformers does it.

        Raises:
            ValueError: the model has no layers that can be recomputed.
        """
        self.recompute = mode
        scoring_head(self.model).cache_mb = logits_mb(mode)
        if mode == "none":
            return
        if self.packs:
            self._layers = checkpointed_layers(self.model)
        else:
            self.model.activation_checkpointing_enable()

    def recompute_of(self, batch: PackedBatch) -> SelectiveRecompute | None:
        """For one forward with gradients: what to call the policy with, besides the batch."""
        if self.recompute == "none" or not self.packs:
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
            recording = nullcontext() if recompute is None else recompute.recording()
            with recording, rows_of_tied_embeddings(self.model, device_type):
                hidden_ND = self.scored_hidden(batch)
            head: Any = self.model.get_output_embeddings()
            return head(hidden_ND, batch)

    def scored_hidden(self, batch: PackedBatch) -> Tensor:
        """[N, D] final hidden states of the scored rows."""
        if not self.packs:
            hidden_TD = plain_hidden(text_decoder(self.model), batch.token_T, batch.layout)
            return hidden_TD.index_select(0, batch.scored_N)
        with packed(batch.layout, self.attention_impl):
            output = text_decoder(self.model)(
                input_ids=batch.token_T[None],
                position_ids=batch.position_T[None],
                use_cache=False,
            )
        return output.last_hidden_state[0].index_select(0, batch.scored_N)

    def stop_packing(self) -> None:
        """From now on every sequence is a row of its own, with the model's own attention."""
        self.model.set_attn_implementation(self.plain_attention)
        self.packs = False
        self.set_recompute(self.recompute)


@contextmanager
def unpacked(policy: Policy) -> Generator[PreTrainedModel]:
    """The model with its own attention, for plain forwards and ``generate``."""
    training = policy.model.training
    policy.model.set_attn_implementation(policy.plain_attention)
    # In training mode with checkpointing on, transformers drops the cache that decoding needs.
    policy.model.eval()
    try:
        yield policy.model
    finally:
        policy.model.train(training)
        if policy.packs:
            policy.model.set_attn_implementation(ATTENTION_NAME)


def group_logps(logp_S: Tensor, batch: PackedBatch) -> Tensor:
    """[P, C] the log-probabilities of each prompt's candidates; 0 where there is none."""
    logp_PC = logp_S[batch.seq_of_PC.reshape(-1)].view(batch.seq_of_PC.shape)
    return logp_PC.masked_fill(~batch.mask_PC, 0.0)


def mismatched_logps(logp_S: Tensor, batch: PackedBatch) -> Tensor:
    """[P] the log-probabilities of the mismatched completions of a batch that has them."""
    assert batch.mismatched_P is not None
    return logp_S[batch.mismatched_P]


def scoring_head(model: PreTrainedModel) -> ScoringHead:
    """The head that ``Policy`` put into a model, without the adapter that may stand around it."""
    outer: Any = model.get_output_embeddings()
    head = getattr(outer, "base_layer", outer)
    assert isinstance(head, ScoringHead)
    return head


def logits_mb(recompute: str) -> float:
    """MiB of logits that are kept for the backward in a mode of ``mcpo.recompute``."""
    return LOGITS_MB if recompute == "light" else 0.0


@contextmanager
def rows_of_tied_embeddings(model: PreTrainedModel, device_type: str) -> Generator[None]:
    """Where head and embeddings have one weight, embeddings inside have a sparse gradient.

    The head's is dense, so their sum is dense too, and no table of zeros need be made for the few
    rows that tokens have. DDP asks modules beforehand what their gradients will be; so the flag is
    set for a forward and not for good.
    """
    embeddings, head = model.get_input_embeddings(), scoring_head(model)
    # On other devices rows are added by atomics, whose order differs from run to run.
    if (
        not isinstance(embeddings, nn.Embedding)
        or embeddings.weight is not head.weight
        or device_type != "cpu"
    ):
        yield
        return
    before, embeddings.sparse = embeddings.sparse, True
    try:
        yield
    finally:
        embeddings.sparse = before


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability to 0, in modules and where attention layers read it."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "attn_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """The autocast dtype where autocast is on, else the dtype of the hidden states."""
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return hidden.dtype
