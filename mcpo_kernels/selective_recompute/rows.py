"""Which rows of a packed forward stay, and how anything laid out by rows is cut down to them."""
# T packed tokens, R of them kept, Q dropped

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mcpo_kernels.prefix_attention.layout import PackedMask, PrefixLayout

if TYPE_CHECKING:
    from collections.abc import Iterable


@dataclass(frozen=True, slots=True)
class Rows:
    """Some segments of a layout with all that they attend to."""

    whole: PrefixLayout
    layout: PrefixLayout
    """Of the kept segments alone."""
    kept_R: Tensor
    """[R] int64, their rows in ``whole``, ascending."""
    dropped_Q: Tensor
    """[Q] int64, the others."""

    @classmethod
    def of(cls, layout: PrefixLayout, segments: Iterable[int], device: torch.device) -> Rows:
        """The rows of these segments and of their ancestors.

        Raises:
            ValueError: there is no such segment, or none at all.
        """
        kept = layout.with_ancestors(segments)
        if not kept:
            raise ValueError(
                "segments must name at least one segment to keep, got none; without a gradient "
                "there is nothing to call backward for"
            )
        stays = torch.zeros(len(layout.lengths), dtype=torch.bool)
        stays[list(kept)] = True
        stays_T = stays.repeat_interleave(torch.tensor(layout.lengths))
        return cls(
            layout,
            layout.restricted(kept),
            stays_T.nonzero().squeeze(1).to(device),
            (~stays_T).nonzero().squeeze(1).to(device),
        )

    @property
    def is_everything(self) -> bool:
        """Whether no row is dropped."""
        return len(self.dropped_Q) == 0

    def restrict(self, value: Any) -> Any:
        """``value`` with every tensor, mask and layout in it cut down to the kept rows.

        Raises:
            NotImplementedError: something in it has rows in a way that is not known here.
        """
        match value:
            case Tensor():
                return self._restricted(value)
            case PackedMask():
                return replace(value, layout=self.layout)
            case tuple():
                return tuple(self.restrict(entry) for entry in value)
            case list():
                return [self.restrict(entry) for entry in value]
            case Mapping():
                return {name: self.restrict(entry) for name, entry in value.items()}
            case (
                None
                | bool()
                | int()
                | float()
                | str()
                | torch.dtype()
                | torch.device()
                | nn.Module()
            ):
                return value
            case _:
                raise NotImplementedError(
                    "the arguments of a layer must be tensors, a PackedMask, numbers or texts, to "
                    f"be cut down to the rows with gradient, got {type(value).__name__}; use full "
                    "recomputation with this model"
                )

    def _restricted(self, tensor: Tensor) -> Tensor:
        num_tokens = self.whole.num_tokens
        dim = row_dim(tensor, num_tokens)
        if dim is not None:
            return tensor.index_select(dim, self.kept_R)
        if num_tokens in tensor.shape:
            raise NotImplementedError(
                f"a tensor with rows must be [1, T, ...] or [T, ...], T = {num_tokens} packed "
                f"tokens, to be cut down to the rows with gradient, got {list(tensor.shape)}; use "
                "full recomputation with this model"
            )
        return tensor

    def scatter(self, gradient: Tensor, dim: int | None) -> Tensor:
        """What ``restrict`` cut along ``dim``, whole again: as given in the kept rows, else 0."""
        if dim is None:
            return gradient
        shape = list(gradient.shape)
        shape[dim] = self.whole.num_tokens
        return gradient.new_zeros(shape).index_copy_(dim, self.kept_R, gradient)


def row_dim(tensor: Tensor, num_tokens: int) -> int | None:
    """The dimension that counts packed tokens: of [1, T, ...] the second, of [T, ...] the first."""
    if tensor.ndim >= 2 and tensor.shape[0] == 1 and tensor.shape[1] == num_tokens:
        return 1
    if tensor.ndim >= 1 and tensor.shape[0] == num_tokens:
        return 0
    return None
