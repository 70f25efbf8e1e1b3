"""Which tokens of a packed sequence attend to which: segments with parents."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

NO_PARENT = -1


@dataclass(frozen=True, slots=True)
class PrefixLayout:
    """Segments laid end to end, each continuing its parent segment or starting afresh.

    A token attends causally to its own segment and to the whole of every ancestor. The same type
    serves plain varlen packing (no parents), a prompt with its candidates, and deeper trees.

    Args:
        lengths: tokens of each segment, in packed order; 0 is allowed.
        parents: index of the segment whose tokens are the prefix, or ``NO_PARENT``; always an
            earlier one.

    Raises:
        ValueError: lengths and parents differ in number, a length is negative, or a parent is not
            earlier.
    """

    lengths: tuple[int, ...]
    parents: tuple[int, ...]

    def __post_init__(self) -> None:
        """Check."""
        if len(self.lengths) != len(self.parents):
            raise ValueError(
                "lengths and parents must have one entry per segment, got "
                f"{len(self.lengths)} lengths and {len(self.parents)} parents"
            )
        for segment, (length, parent) in enumerate(zip(self.lengths, self.parents, strict=True)):
            if length < 0:
                raise ValueError(f"lengths must be >= 0, got {length} for segment {segment}")
            if not NO_PARENT <= parent < segment:
                raise ValueError(
                    f"a parent must be {NO_PARENT} or an earlier segment, got {parent} for segment "
                    f"{segment}"
                )

    @classmethod
    def varlen(cls, lengths: tuple[int, ...]) -> PrefixLayout:
        """Plain packing: no segment sees another."""
        return cls(lengths, (NO_PARENT,) * len(lengths))

    @property
    def starts(self) -> tuple[int, ...]:
        """Index of the first token of each segment."""
        return tuple(accumulate(self.lengths, initial=0))[:-1]

    @property
    def num_tokens(self) -> int:
        """T."""
        return sum(self.lengths)

    def ancestors(self, segment: int) -> tuple[int, ...]:
        """The segments whose tokens come before ``segment``, outermost first."""
        chain: list[int] = []
        parent = self.parents[segment]
        while parent != NO_PARENT:
            chain.append(parent)
            parent = self.parents[parent]
        return tuple(reversed(chain))

    def prefix_length(self, segment: int) -> int:
        """Tokens before the first one of ``segment`` in its own sequence: its first position."""
        return sum(self.lengths[ancestor] for ancestor in self.ancestors(segment))

    def with_ancestors(self, segments: Iterable[int]) -> tuple[int, ...]:
        """These segments and all they continue, in packed order.

        Raises:
            ValueError: there is no such segment.
        """
        found: set[int] = set()
        for segment in segments:
            if not 0 <= segment < len(self.lengths):
                raise ValueError(
                    f"a segment must be in [0, {len(self.lengths)}), the segments of the layout, "
                    f"got {segment}"
                )
            found.update((segment, *self.ancestors(segment)))
        return tuple(sorted(found))

    def restricted(self, segments: Iterable[int]) -> PrefixLayout:
        """The layout of these segments and their ancestors alone, in packed order.

        Whatever is left attends to the tokens it attended to before, for those stay with it.

        Raises:
            ValueError: there is no such segment.
        """
        kept = self.with_ancestors(segments)
        number = {segment: new for new, segment in enumerate(kept)} | {NO_PARENT: NO_PARENT}
        return PrefixLayout(
            tuple(self.lengths[segment] for segment in kept),
            tuple(number[self.parents[segment]] for segment in kept),
        )


@dataclass(frozen=True, slots=True)
class PackedMask:
    """A layout in the place of an attention mask, with the window of the layer that gets it."""

    layout: PrefixLayout
    window: int | None
    """Keys a token sees along its chain, as this kind of layer asked for; None for all."""
