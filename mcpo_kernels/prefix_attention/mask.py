"""A layout in the place of an attention mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mcpo_kernels.prefix_attention.choose import AttentionImpl

if TYPE_CHECKING:
    from mcpo_kernels.prefix_attention.layout import PrefixLayout


class UnpackableError(NotImplementedError):
    """The model cannot be served from a packed row; the message says why."""


@dataclass(frozen=True, slots=True)
class PackedMask:
    """What the layers get as their attention mask: the layout, and the window they asked for."""

    layout: PrefixLayout
    window: int | None
    """Keys a token sees along its chain, as this kind of layer asked for; None for all."""
    impl: AttentionImpl = AttentionImpl.AUTO
    """As ``packed`` was told: a layer that runs again in a backward computes as it did."""

    def __getitem__(self, index: tuple[slice, ...]) -> PackedMask:
        """Itself, where a model takes all of it: Gemma 4 cuts its masks to the rows it keeps.

        Raises:
            UnpackableError: part of the mask is taken.
        """
        if any(part not in (slice(None), slice(0, None)) for part in index):
            raise UnpackableError(
                f"the model takes a part of its attention mask, {index}, which must stay whole; "
                "call it for all of its rows, without logits_to_keep"
            )
        return self
