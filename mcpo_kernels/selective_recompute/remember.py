"""What a layer's replay is told instead of finding it out again.

Three kinds of calls are noted while a layer runs for the first time and answered when it runs
again:

- ``topk`` over rows, which is how routers choose experts. Products of another shape round
  otherwise, so a near tie could send a token to another expert than the one it was scored with.
- ``linear`` on [1, T, D], if asked for: most of a layer's arithmetic. Its backward needs its inputs
  and weight alone, so a replay that is handed the result multiplies nothing.
- attention over the pack, if asked for and where the kernel gives its log-sum-exps: with them and
  the result its backward needs no forward.
"""
# T packed tokens, R of them kept, D in, O out

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from mcpo_kernels.prefix_attention import cpu
from mcpo_kernels.selective_recompute.products import Inputs, Product, known_linear, linear
from mcpo_kernels.selective_recompute.rows import row_dim

_TOPK = (torch.topk, torch.Tensor.topk)
_ASKED = frozenset((*_TOPK, functional.linear, cpu.attend))


@dataclass(frozen=True, slots=True)
class Note:
    """Of one call; autograd holds the answers."""

    kind: Callable[..., Any]
    """``topk``, ``linear`` or ``cpu.attend``."""
    product: Product | None
    """Of ``linear``."""
    known: int
    """Answers; 0 where the layer overwrote the result in place."""


@dataclass(frozen=True, slots=True)
class Notes:
    """What was asked in one layer call, in order."""

    everything: bool
    """Not ``topk`` alone."""
    calls: tuple[Note, ...]

    def without_casts(self) -> Notes:
        """The same, where nothing but the casts of weights that were kept is let go."""
        return Notes(
            self.everything,
            tuple(
                note
                if note.product is None
                else replace(note, product=note.product._replace(cast_OD=None))
                for note in self.calls
            ),
        )


class Noting(TorchFunctionMode):
    """Notes the answers while a layer runs over all rows."""

    def __init__(self, num_tokens: int, *, everything: bool) -> None:
        super().__init__()
        self._num_tokens = num_tokens
        self._everything = everything
        self._inputs = Inputs()
        self._noted: list[tuple[Callable[..., Any], Product | None, tuple[Tensor, ...], int]] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Call, and note what is worth it."""
        kwargs = kwargs or {}
        if self._everything and _is_product_of_rows(func, args, self._num_tokens):
            result, product = linear(self._inputs, *args, **kwargs)
            self._note(functional.linear, product, result)
            return result
        result = func(*args, **kwargs)
        if func not in _ASKED:
            return result
        if func in _TOPK and _chooses_by_row(args, kwargs, self._num_tokens):
            self._note(torch.topk, None, result[1])
        elif self._everything and func is cpu.attend:
            self._note(func, None, *result)
        return result

    def _note(
        self, kind: Callable[..., Any], product: Product | None, first: Tensor, *others: Tensor
    ) -> None:
        self._noted.append((kind, product, (first, *others), first._version))

    def finish(self) -> tuple[Notes, list[Tensor]]:
        """The notes, and the answers that are known."""
        calls: list[Note] = []
        known: list[Tensor] = []
        for kind, product, answers, version in self._noted:
            still = answers if answers[0]._version == version else ()
            calls.append(Note(kind, product, len(still)))
            known.extend(still)
        return Notes(self._everything, tuple(calls)), known


class Telling(TorchFunctionMode):
    """Answers in the order of the notes while the layer runs again over R rows."""

    def __init__(self, notes: Notes, answers: Sequence[Tensor], num_rows: int) -> None:
        super().__init__()
        rest = iter(answers)
        self._expected = iter(
            [(note, tuple(next(rest) for _ in range(note.known))) for note in notes.calls]
        )
        self._everything = notes.everything
        self._num_rows = num_rows
        self._inputs = Inputs()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Answer from the notes, or call."""
        kwargs = kwargs or {}
        if func not in _ASKED:
            return func(*args, **kwargs)
        if func in _TOPK and _chooses_by_row(args, kwargs, self._num_rows):
            _, known = self._next(torch.topk)
            if known:
                return torch.return_types.topk((args[0].gather(-1, known[0]), known[0]))
        elif self._everything and _is_product_of_rows(func, args, self._num_rows):
            product, known = self._next(func, args[1])
            if known and product is not None:
                return known_linear(self._inputs, product, known[0], *args, **kwargs)
        elif self._everything and func is cpu.attend:
            _, known = self._next(func)
            if known:
                output, lse = known
                return cpu.attend_again(args[:3], *args[3:], known=(output, lse))
        return func(*args, **kwargs)

    def _next(
        self, kind: Callable[..., Any], weight: Tensor | None = None
    ) -> tuple[Product | None, tuple[Tensor, ...]]:
        expected, answers = next(self._expected, (None, ()))
        product = expected.product if expected else None
        if (
            expected is None
            or expected.kind is not kind
            or (product.weight if product else None) is not weight
        ):
            raise RuntimeError(
                "a layer must make the same calls in the same order when it is replayed: topk, "
                "linear layers, attention; this one does not; use recomputation without kept "
                "products for it"
            )
        return product, answers


def _chooses_by_row(args: Any, kwargs: Any, num_rows: int) -> bool:
    """Whether a ``topk`` runs along the last dimension of something with rows."""
    scores = args[0] if args else None
    dim = args[2] if len(args) > 2 else (kwargs or {}).get("dim", -1)
    if not isinstance(scores, Tensor) or scores.ndim < 2 or dim not in (-1, scores.ndim - 1):
        return False
    return row_dim(scores[..., 0], num_rows) is not None


def _is_product_of_rows(func: Any, args: Any, num_rows: int) -> bool:
    """Whether a call is a linear layer on [1, T, D], whose rows are those of the pack.

    Experts get [n, D], rows of their own choice; those are not noted.
    """
    if func is not functional.linear or len(args) < 2:
        return False
    input, weight = args[0], args[1]
    return (
        isinstance(weight, nn.Parameter)
        and input.ndim == 3
        and input.shape[0] == 1
        and input.shape[1] == num_rows
    )
