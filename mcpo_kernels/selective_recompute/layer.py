"""One layer under selective recompute: run once without a graph, replayed in the backward.

The first run keeps the layer's inputs alone. The backward runs the layer again, with a graph, on
the rows that were chosen meanwhile, and goes through that graph at once. Parameters receive their
gradients there, as in torch's reentrant checkpointing, so the hooks of DDP, FSDP2 and ZeRO fire as
they do for it.
"""
# T packed tokens

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from mcpo_kernels.selective_recompute.remember import Notes, Noting, Telling
from mcpo_kernels.selective_recompute.rows import Rows, row_dim

if TYPE_CHECKING:
    from mcpo_kernels.prefix_attention.layout import PrefixLayout


CHANGED = (
    "the input of a layer must stay as it was until its backward, and one was changed in place; "
    "train this model without recompute"
)


class Choice:
    """The rows of one forward, open until they are chosen; its layers share it."""

    def __init__(self, layout: PrefixLayout, *, keep_products: bool) -> None:
        self.layout = layout
        self.keep_products = keep_products
        self.rows: Rows | None = None
        """None while all rows are to be replayed."""
        self.backward_began = False

    @property
    def num_rows(self) -> int:
        """Rows that a replay runs over."""
        return self.layout.num_tokens if self.rows is None else self.rows.layout.num_tokens


@dataclass(eq=False)
class Held:
    """What autograd holds for one layer call: inputs and answers, cut down once rows are chosen.

    Autograd lets go of it when the graph is freed, so nothing lives longer than it must.
    """

    tensors: list[Tensor] = field(default_factory=list[Tensor])
    versions: list[int] = field(default_factory=list[int])

    def pack(self, tensor: Tensor) -> tuple[Held, int]:
        """In the place of a tensor that autograd saves."""
        self.tensors.append(tensor.detach())
        self.versions.append(tensor._version)
        return self, len(self.tensors) - 1

    def cut(self, rows: Rows) -> None:
        """Keep the chosen rows and let the others go."""
        for number, tensor in enumerate(self.tensors):
            self._check(number)
            self.tensors[number] = rows.restrict(tensor)
            self.versions[number] = self.tensors[number]._version

    def _check(self, number: int) -> None:
        if self.tensors[number]._version != self.versions[number]:
            raise RuntimeError(CHANGED)

    def __getitem__(self, number: int) -> Tensor:
        """The tensor as it is now."""
        self._check(number)
        return self.tensors[number]


def unpack(place: tuple[Held, int]) -> Tensor:
    """What autograd gets back."""
    held, number = place
    return held[number]


@dataclass(frozen=True, slots=True)
class LayerCall:
    """A layer with its arguments; tensors that may need gradients are given apart."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    """None in the places of those tensors."""
    places: tuple[int, ...]
    """Where they belong."""
    options: Mapping[str, Any]
    choice: Choice
    autocast: tuple[tuple[str, bool, torch.dtype], ...]
    """Per device type whether autocast was on, and its dtype."""

    @classmethod
    def of(
        cls, choice: Choice, function: Callable[..., Any], arguments: tuple[Any, ...]
    ) -> tuple[LayerCall, tuple[Tensor, ...]]:
        """The call and its tensors.

        Raises:
            NotImplementedError: a tensor that needs a gradient is not a positional argument.
        """
        options: Mapping[str, Any] = {}
        if isinstance(function, partial):
            options = function.keywords
            arguments = (*function.args, *arguments)
            function = function.func
        places = tuple(place for place, value in enumerate(arguments) if _is_differentiable(value))
        others = [None if place in places else value for place, value in enumerate(arguments)]
        if any(_needs_gradient(value) for value in (*others, *options.values())):
            raise NotImplementedError(
                "a tensor that needs a gradient must be a positional argument of its layer, got "
                "one among its keywords or inside a tuple; train this model without recompute"
            )
        if not places:
            raise NotImplementedError(
                "a layer must get its hidden states as a positional argument to be replayed, got "
                "none; train this model without recompute"
            )
        devices = dict.fromkeys(("cpu", *(arguments[place].device.type for place in places)))
        autocast = tuple(
            (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in devices
        )
        call = cls(function, tuple(others), places, options, choice, autocast)
        return call, tuple(arguments[place] for place in places)

    def run(self, tensors: tuple[Tensor, ...], rows: Rows | None) -> Any:
        """The layer's output for ``tensors``, which are cut down to ``rows`` already."""
        others, options = self.arguments, self.options
        if rows is not None:
            others, options = rows.restrict(others), rows.restrict(options)
        arguments = list(others)
        for place, tensor in zip(self.places, tensors, strict=True):
            arguments[place] = tensor
        with ExitStack() as stack:
            for kind, enabled, dtype in self.autocast:
                # Every weight is used once, so a cache of cast weights would only hold memory; and
                # what it cast without a graph must not be found where there is one.
                stack.enter_context(
                    torch.autocast(kind, enabled=enabled, dtype=dtype, cache_enabled=False)
                )
            return self.function(*arguments, **options)


class Replayed(Function):
    """A layer that keeps its inputs, and in the backward runs again over the chosen rows."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, call: LayerCall, *tensors: Tensor) -> Any:
        """Over all rows, without a graph; ``anchor`` makes one begin here."""
        ctx.set_materialize_grads(False)
        choice = call.choice
        noting = Noting(choice.layout.num_tokens, everything=choice.keep_products)
        before = _random_state(tensors[0].device)
        versions = [tensor._version for tensor in tensors]
        with noting:
            output = call.run(tensors, None)
        if not torch.equal(before, _random_state(tensors[0].device)):
            raise NotImplementedError(
                "a layer must not draw random numbers when it is replayed on other rows, and this "
                "one did; switch dropout and router noise off"
            )
        if versions != [tensor._version for tensor in tensors]:
            raise RuntimeError(CHANGED)
        ctx.call = call
        ctx.notes, answers = noting.finish()
        ctx.dims = tuple(row_dim(tensor, choice.layout.num_tokens) for tensor in tensors)
        # Detached, as an answer may be what the layer returns, and that belongs to the graph.
        ctx.save_for_backward(*tensors, *(answer.detach() for answer in answers))
        return output

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *gradients: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Through the chosen rows; the others have no gradient and get zeros."""
        # It has no public name.
        if not torch.autograd._is_checkpoint_valid():  # pyright: ignore[reportPrivateUsage]
            raise RuntimeError(
                "recomputed layers put gradients into parameters, so they need loss.backward() "
                "without inputs=, got torch.autograd.grad or inputs="
            )
        call: LayerCall = ctx.call
        call.choice.backward_began = True
        rows, num_rows = call.choice.rows, call.choice.num_rows
        held: tuple[Tensor, ...] = ctx.saved_tensors
        wanted: tuple[bool, ...] = ctx.needs_input_grad[2:]
        inputs = tuple(
            tensor.detach().requires_grad_(wants)
            for tensor, wants in zip(held[: len(wanted)], wanted, strict=True)
        )
        notes: Notes = ctx.notes
        with torch.enable_grad(), Telling(notes, held[len(wanted) :], num_rows):
            outputs = call.run(inputs, rows)
        _go_back(outputs, gradients, rows)
        # The loss may live on, and with it this node; a second backward casts anew.
        ctx.notes = notes.without_casts()
        found = tuple(tensor.grad for tensor in inputs)
        if rows is None:
            return None, None, *found
        return (
            None,
            None,
            *(
                None if gradient is None else rows.scatter(gradient, dim)
                for gradient, dim in zip(found, ctx.dims, strict=True)
            ),
        )


def _go_back(outputs: Any, gradients: tuple[Tensor | None, ...], rows: Rows | None) -> None:
    """Nested backward through the graph of a replay."""
    pairs = [
        (output, gradient if rows is None else _kept_gradient(gradient, rows))
        for output, gradient in zip(
            outputs if isinstance(outputs, tuple) else (outputs,), gradients, strict=True
        )
        if gradient is not None and isinstance(output, Tensor) and output.requires_grad
    ]
    if pairs:
        torch.autograd.backward([output for output, _ in pairs], [given for _, given in pairs])


def _kept_gradient(gradient: Tensor, rows: Rows) -> Tensor:
    """The kept rows of what comes from above; the dropped ones must hold zeros.

    On the CPU another number raises. Elsewhere looking would wait for the device, so it makes the
    gradient NaN, and no wrong number comes out either way. NaN makes NaN everywhere, as it would
    in a whole backward.
    """
    dim = row_dim(gradient, rows.whole.num_tokens)
    if dim is None:
        return gradient
    kept = gradient.index_select(dim, rows.kept_R)
    if rows.is_everything:
        return kept
    others = gradient.index_select(dim, rows.dropped_Q)
    lost = others.ne(0).any()
    if gradient.device.type == "cpu":
        if not bool(lost):
            return kept
        if not bool(others.isnan().any()):
            raise RuntimeError(
                "a gradient reached rows that were not chosen, so their share would be lost; "
                "choose every segment that the loss depends on, or do not choose at all"
            )
    return poisoned(kept, lost)


def poisoned(gradient: Tensor, lost: Tensor) -> Tensor:
    """The gradient, or NaN everywhere if ``lost`` holds, without waiting for the device."""
    return gradient.masked_fill(lost, torch.nan)


def _is_differentiable(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _needs_gradient(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_needs_gradient(entry) for entry in value.values())
    if isinstance(value, tuple | list):
        return any(_needs_gradient(entry) for entry in value)
    return isinstance(value, Tensor) and value.requires_grad


def _random_state(device: torch.device) -> Tensor:
    """What changes when a random number is drawn; kept on the host for every device."""
    if device.type == "cpu":
        return torch.get_rng_state()
    return torch.get_device_module(device).get_rng_state(device)
