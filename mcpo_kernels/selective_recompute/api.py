"""Activation checkpointing that replays only the rows with gradient.

    layers = checkpointed_layers(model)
    recompute = SelectiveRecompute(layers, layout)
    with packed(layout), recompute.recording():
        hidden = model(input_ids=token_T[None], position_ids=position_T[None]).last_hidden_state
    ...                               # log-probabilities of all candidates; negatives are drawn
    recompute.choose(segments)        # chosen and drawn candidates
    loss.backward()

A segment attends to itself and to its ancestors. So if the loss depends on some segments alone, the
gradient of every layer is zero in all rows but theirs and their ancestors', and a replay of these
rows gives them the keys, the values and the gradients they had in the whole: exact, for a fraction
of the work. The forward that scores all candidates is the forward that trains.
"""

from __future__ import annotations

import weakref
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mcpo_kernels.selective_recompute.layer import Choice, Held, LayerCall, Replayed, unpack
from mcpo_kernels.selective_recompute.rows import Rows

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Sequence

    from mcpo_kernels.prefix_attention.layout import PrefixLayout

_SWITCHES = ("gradient_checkpointing", "_gradient_checkpointing_func")


class SelectiveRecompute:
    """One forward of a model over a packed row, and what its backward computes again.

    Make one for every forward. Any number may be under way; nothing is kept anywhere else.

    Args:
        layers: modules that ask for checkpointing as transformers' ``GradientCheckpointingLayer``
            does: in training mode with ``gradient_checkpointing`` set they call
            ``self._gradient_checkpointing_func(partial(forward, self, **options), hidden, ...)``.
            Hidden states and all else with a gradient are positional, [1, T, ...] or [T, ...].
        layout: of the packed row of T tokens.
        keep_products: also keep the results of linear layers, which then are not multiplied
            again. The backward costs no product more than one without recompute.
    """

    def __init__(
        self, layers: Sequence[nn.Module], layout: PrefixLayout, *, keep_products: bool = False
    ) -> None:
        self._layers = tuple(layers)
        self._choice = Choice(layout, keep_products=keep_products)
        self._held: list[weakref.ref[Held]] = []
        self._device: torch.device | None = None
        self._recorded = False

    @contextmanager
    def recording(self) -> Generator[None]:
        """Surrounds the forward: inside, layers keep what a replay needs and build no graph.

        Raises:
            RuntimeError: it surrounded a forward before, or no layer asked to be checkpointed.
        """
        if self._recorded:
            raise RuntimeError(
                "recording() must surround one forward, and this one was used before; make a "
                "SelectiveRecompute for every forward"
            )
        self._recorded = True
        before = [
            {name: getattr(layer, name, None) for name in _SWITCHES} for layer in self._layers
        ]
        try:
            for layer in self._layers:
                _switch(layer, (True, partial(self._run, layer)))
            yield
        finally:
            for layer, values in zip(self._layers, before, strict=True):
                _switch(layer, values.values())
        if torch.is_grad_enabled() and self._device is None:
            raise RuntimeError(
                "no layer asked to be checkpointed inside recording(): the model must be in "
                "training mode, and the forward must run with gradients"
            )

    def choose(self, segments: Iterable[int]) -> Tensor:
        """Say, after the forward and before the backward, which segments the loss depends on.

        Their ancestors stay with them. What was kept of all other rows is freed at once. If it is
        never called, the backward replays every row, as ordinary checkpointing does.

        Returns:
            The rows that the backward will replay, ascending.

        Raises:
            ValueError: there is no such segment, or none is named.
            RuntimeError: the forward has not run, or rows were chosen or replayed already.
        """
        if self._device is None:
            raise RuntimeError("choose() must follow the forward inside recording()")
        if self._choice.rows is not None or self._choice.backward_began:
            raise RuntimeError(
                "choose() must be called once and before the backward, got a second call or one "
                "after it; make a SelectiveRecompute for every forward"
            )
        rows = Rows.of(self._choice.layout, segments, self._device)
        if not rows.is_everything:
            for held in self._alive():
                held.cut(rows)
        self._choice.rows = rows
        return rows.kept_R

    def kept_bytes(self) -> int:
        """Bytes of memory that are held for the backward at this moment."""
        storages = [tensor.untyped_storage() for held in self._alive() for tensor in held.tensors]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    def _alive(self) -> list[Held]:
        """Of layers whose graph was not freed yet."""
        return [held for reference in self._held if (held := reference()) is not None]

    def _run(self, layer: nn.Module, function: Callable[..., Any], *arguments: Any) -> Any:
        """What a layer calls in the place of its forward."""
        call, tensors = LayerCall.of(self._choice, function, arguments)
        self._device = tensors[0].device
        trains = any(parameter.requires_grad for parameter in layer.parameters())
        needed = trains or any(tensor.requires_grad for tensor in tensors)
        if not (needed and torch.is_grad_enabled()):
            return function(*arguments)
        held = Held()
        self._held.append(weakref.ref(held))
        # Below frozen embeddings no input asks for a gradient, and the layer's weights still do.
        anchor = torch.empty(0, requires_grad=trains)
        with torch.autograd.graph.saved_tensors_hooks(held.pack, unpack):
            return Replayed.apply(anchor, call, *tensors)


def _switch(layer: nn.Module, values: Iterable[Any]) -> None:
    for name, value in zip(_SWITCHES, values, strict=True):
        setattr(layer, name, value)
