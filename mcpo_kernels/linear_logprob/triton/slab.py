"""One slab of the vocabulary, as the kernels of the backward are launched on it."""
# N scored tokens, M of them with gradient, W columns of the slab

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from mcpo_kernels.linear_logprob.triton import tiles

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from mcpo_kernels.linear_logprob.head import Head
    from mcpo_kernels.linear_logprob.triton.launch import Launch
    from mcpo_kernels.linear_logprob.triton.rows import Rows
    from mcpo_kernels.linear_logprob.triton.selection import Needed

MIB = 2**20


class Slab(NamedTuple):
    """Columns of the vocabulary and what their gradients are computed from."""

    rows: Rows
    needed: Needed | None
    """What a filter keeps, or None without one."""
    head: Head
    """Of the whole vocabulary; its weight is contiguous."""
    columns: slice
    launch: Launch

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes that every kernel of a slab is told."""
        num_tokens, num_hidden = self.rows.hidden_ND.shape
        num_columns = self.columns.stop - self.columns.start
        return {"num_tokens": num_tokens, "num_columns": num_columns, "num_hidden": num_hidden}


def slabs(num_tokens: int, num_vocab: int, dtype: torch.dtype) -> Iterator[slice]:
    """Slices of the vocabulary whose dz keeps to ``SCRATCH_MIB``."""
    room = tiles.SCRATCH_MIB * MIB // (num_tokens * dtype.itemsize)
    width = max(room // tiles.SLAB_MULTIPLE, 1) * tiles.SLAB_MULTIPLE
    starts = range(0, num_vocab, width)
    return (slice(start, min(start + width, num_vocab)) for start in starts)
