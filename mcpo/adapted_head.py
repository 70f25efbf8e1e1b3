"""The scoring head with a LoRA adapter, inside the fused op.

Logits of W + s B A on hidden states h are those of one wider product,

    h (W + s B A)^T = [h, s h A^T] [W, B]^T,

so the op computes them as it is, on D + r columns. W + s B A itself is never formed: in bf16 it
would round away an update that is small beside W, while B in columns of its own keeps its bits.
The price is a copy of the weight, [V, D + r] in the dtype of the products, and the op's gradient of
the same size, of which only B's columns are used; without an adapter a frozen head costs neither.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn import functional as F

from mcpo.policy import ScoringHead, compute_dtype
from mcpo.records import PackedBatch


class AdaptedHead(LoraLinear):
    """peft's layer around a ``ScoringHead``, which given targets returns log-probabilities."""

    @classmethod
    def of(cls, layer: nn.Module, head: ScoringHead) -> AdaptedHead:
        """Make an output projection with an adapter a scoring one; the layer itself is changed, so
        that peft goes on finding its adapters.

        Raises:
            ValueError: it is more than W + s B A.
        """
        if type(layer) is not LoraLinear or layer.lora_variant:
            raise ValueError(
                "the adapter of an output projection must be plain LoRA to be scored, got "
                f"{type(layer).__name__} with variants {dict(getattr(layer, 'lora_variant', {}))}"
            )
        layer.base_layer = head
        changed: Any = layer
        changed.__class__ = cls
        return changed

    def forward(self, x: Tensor, batch: PackedBatch | None = None) -> Tensor:
        """Logits of ``x``, or the [S] summed log-probabilities of ``batch``'s targets."""
        if batch is None:
            return super().forward(x)
        head: Any = self.base_layer
        if self.disable_adapters:
            return head(x, batch)
        (name,) = self.active_adapters
        down: Any = self.lora_A[name]
        up: Any = self.lora_B[name]
        dtype = compute_dtype(x)
        hidden_ND = x.to(dtype)
        low_NR = self.scaling[name] * F.linear(hidden_ND, down.weight.to(dtype))
        weight_VE = torch.cat([head.weight.to(dtype), up.weight.to(dtype)], dim=1)
        return head.score(torch.cat([hidden_ND, low_NR], dim=1), weight_VE, batch)
