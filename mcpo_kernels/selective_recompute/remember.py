"""What a layer's replay is told instead of finding it out again.

Two kinds of calls are noted while a layer runs for the first time and answered when it runs again:

- ``topk`` over rows, which is how routers choose experts. Products of another shape round
  otherwise, so a near tie could send a token to another expert than the one it was scored with.
- ``linear`` on [1, T, D], if asked for: most of a layer's arithmetic. Its backward needs its inputs
  and weight alone, so a replay that is handed the result multiplies nothing.
"""
# T packed tokens, R of them kept, D in, O out

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from mcpo_kernels.selective_recompute.rows import row_dim

_TOPK = (torch.topk, torch.Tensor.topk)
_ASKED = frozenset((*_TOPK, functional.linear))


@dataclass(frozen=True, slots=True)
class Notes:
    """What was asked in one layer call, in order; autograd holds the answers."""

    products: bool
    weights: tuple[Tensor | None, ...]
    """Of each noted product; None for a ``topk``."""
    known: tuple[bool, ...]
    """False where the layer overwrote the result in place, so that there is no answer."""


class Noting(TorchFunctionMode):
    """Notes the answers while a layer runs over all rows."""

    def __init__(self, num_tokens: int, *, products: bool) -> None:
        super().__init__()
        self._num_tokens = num_tokens
        self._products = products
        self._noted: list[tuple[Tensor | None, Tensor, int]] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Call, and note what is worth it."""
        result = func(*args, **kwargs) if kwargs else func(*args)
        if func not in _ASKED:
            return result
        if func in _TOPK and _chooses_by_row(args, kwargs, self._num_tokens):
            self._noted.append((None, result[1], result[1]._version))
        elif self._products and _is_product_of_rows(func, args, self._num_tokens):
            self._noted.append((args[1], result, result._version))
        return result

    def finish(self) -> tuple[Notes, list[Tensor]]:
        """The notes, and the answers that are known."""
        known = tuple(answer._version == version for _, answer, version in self._noted)
        notes = Notes(self._products, tuple(weight for weight, _, _ in self._noted), known)
        return notes, list(compress((answer for _, answer, _ in self._noted), known))


class Telling(TorchFunctionMode):
    """Answers in the order of the notes while the layer runs again over R rows."""

    def __init__(self, notes: Notes, answers: Sequence[Tensor], num_rows: int) -> None:
        super().__init__()
        rest = iter(answers)
        self._expected = iter(
            [
                (weight, next(rest) if known else None)
                for weight, known in zip(notes.weights, notes.known, strict=True)
            ]
        )
        self._products = notes.products
        self._num_rows = num_rows

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Answer from the notes, or call."""
        if func not in _ASKED:
            return func(*args, **kwargs) if kwargs else func(*args)
        kwargs = kwargs or {}
        if func in _TOPK and _chooses_by_row(args, kwargs, self._num_rows):
            index = self._next(None)
            if index is not None:
                return torch.return_types.topk((args[0].gather(-1, index), index))
        elif self._products and _is_product_of_rows(func, args, self._num_rows):
            output = self._next(args[1])
            if output is not None:
                return known_linear(*args, output=output, **kwargs)
        return func(*args, **kwargs)

    def _next(self, weight: Tensor | None) -> Tensor | None:
        expected, answer = next(self._expected, (None, None))
        if expected is not weight:
            raise RuntimeError(
                "a layer must call the same linear layers in the same order when it is replayed, "
                "and this one does not; use recomputation without kept products for it"
            )
        return answer


def known_linear(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, *, output: Tensor
) -> Tensor:
    """``linear(input, weight, bias)``, of which the value is known and the gradient is wanted."""
    device_type = input.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        input, weight = input.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    return _KnownLinear.apply(input, weight, bias, output)


class _KnownLinear(Function):
    @staticmethod
    def forward(
        ctx: Any, input_1RD: Tensor, weight_OD: Tensor, bias_O: Tensor | None, output_1RO: Tensor
    ) -> Tensor:
        ctx.save_for_backward(input_1RD, weight_OD)
        return output_1RO.view_as(output_1RO)

    @staticmethod
    def backward(
        ctx: Any, *doutputs: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        input_1RD, weight_OD = ctx.saved_tensors
        doutput_RO = doutputs[0][0]
        dinput_1RD = dweight_OD = dbias_O = None
        if ctx.needs_input_grad[0]:
            dinput_1RD = (doutput_RO @ weight_OD)[None]
        if ctx.needs_input_grad[1]:
            dweight_OD = doutput_RO.T @ input_1RD[0]
        if ctx.needs_input_grad[2]:
            dbias_O = doutput_RO.sum(dim=0)
        return dinput_1RD, dweight_OD, dbias_O, None


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
