"""What selective recompute refuses, so that no wrong gradient comes out of it in silence."""

from __future__ import annotations

import pytest
import torch
from replayed_layers import (
    CHOSEN,
    KEPT,
    LAYOUT,
    MASK,
    Block,
    T,
    inputs,
    make_layers,
    run,
    start,
    weighted,
)
from torch import nn

from mcpo_kernels import SelectiveRecompute
from mcpo_kernels.selective_recompute.layer import poisoned


@pytest.mark.parametrize(
    ("segments", "message"), [((9,), r"must be in \[0, 8\).*got 9"), ((), "got none")]
)
def test_bad_choices_are_explained(segments: tuple[int, ...], message: str) -> None:
    recompute, _ = start(make_layers(), inputs())
    with pytest.raises(ValueError, match=message):
        recompute.choose(segments)


def test_a_choice_comes_once_between_forward_and_backward() -> None:
    layers = make_layers()
    with pytest.raises(RuntimeError, match=r"must follow the forward inside recording\(\)"):
        SelectiveRecompute(layers, LAYOUT).choose(CHOSEN)
    recompute, output = start(layers, inputs())
    recompute.choose(CHOSEN)
    with pytest.raises(RuntimeError, match="once and before the backward, got a second call"):
        recompute.choose(CHOSEN)
    recompute, output = start(layers, inputs())
    weighted(output).backward()
    with pytest.raises(RuntimeError, match="once and before the backward"):
        recompute.choose(CHOSEN)


@pytest.mark.parametrize("row", [7, 16])
def test_a_gradient_in_a_row_that_was_not_chosen_is_refused(row: int) -> None:
    layers = make_layers()
    recompute, output = start(layers, inputs())
    recompute.choose(CHOSEN)
    with pytest.raises(RuntimeError, match="gradient reached rows that were not chosen"):
        weighted(output, [*KEPT[:3], row]).backward()


def test_nan_in_a_row_that_was_not_chosen_stays_nan() -> None:
    """As an infinite activation of an undrawn candidate makes it, whose gradient is 0 * inf."""
    layers = make_layers()
    recompute, output = start(layers, inputs())
    recompute.choose(CHOSEN)
    (weighted(output) + torch.nan * output[0, 7].sum()).backward()
    assert layers[0].project.weight.grad.isnan().all()


def test_where_looking_would_wait_a_lost_gradient_makes_nan() -> None:
    gradient = torch.ones(2, 3)
    assert poisoned(gradient, torch.tensor(True)).isnan().all()
    assert torch.equal(poisoned(gradient, torch.tensor(False)), gradient)


def test_the_model_must_train() -> None:
    layers = make_layers().eval()
    recompute = SelectiveRecompute(layers, LAYOUT)
    with (
        pytest.raises(RuntimeError, match=r"no layer asked to be checkpointed.*in training mode"),
        recompute.recording(),
    ):
        run(layers, inputs())


@pytest.mark.parametrize("wanted", ["grad", "inputs"])
def test_gradients_of_chosen_tensors_are_refused(wanted: str) -> None:
    layers, hidden = make_layers(), inputs()
    recompute, output = start(layers, hidden)
    recompute.choose(CHOSEN)
    loss = weighted(output)
    ask = {
        "grad": lambda: torch.autograd.grad(loss, hidden),
        "inputs": lambda: loss.backward(inputs=[hidden]),
    }
    with pytest.raises(RuntimeError, match=r"need loss\.backward\(\) without inputs="):
        ask[wanted]()


def test_random_numbers_are_refused() -> None:
    with pytest.raises(NotImplementedError, match=r"must not draw random.*switch dropout"):
        start(make_layers(dropout=0.5), inputs())


class Overwriting(Block):
    def forward(self, hidden, **options):
        output = super().forward(hidden, **options)
        hidden.detach().zero_()
        return output


def test_an_input_changed_in_place_is_refused() -> None:
    with pytest.raises(RuntimeError, match="changed in place"):
        start(nn.ModuleList([Overwriting()]).double().train(), inputs())
    hidden = inputs()
    recompute, output = start(make_layers(), hidden)
    hidden.detach().zero_()
    with pytest.raises(RuntimeError, match="changed in place"):
        recompute.choose(CHOSEN)
    with pytest.raises(RuntimeError, match="changed in place"):
        weighted(output).backward()


def test_arguments_that_cannot_be_followed_are_refused() -> None:
    layers, hidden = make_layers(), inputs()
    table = torch.ones(1, T, 2, requires_grad=True)
    with pytest.raises(NotImplementedError, match="must be a positional argument of its layer"):
        start(layers, hidden, table=(table,))
    recompute = SelectiveRecompute(layers, LAYOUT)
    with (
        pytest.raises(NotImplementedError, match="hidden states as a positional argument"),
        recompute.recording(),
    ):
        layers[0](hidden=hidden.detach(), mask=MASK)
    for value, message in (
        (torch.ones(2, T), rf"\[1, T, \.\.\.\] or \[T, \.\.\.\], T = {T} .*got \[2, {T}\]"),
        (object(), "a PackedMask, numbers or texts.*got object"),
    ):
        recompute, output = start(layers, hidden, value=value)
        recompute.choose(CHOSEN)
        with pytest.raises(NotImplementedError, match=message):
            weighted(output).backward()


class Fickle(Block):
    def forward(self, hidden, **options):
        if self.seen:
            hidden = self.out(hidden)
        return super().forward(hidden, **options)


def test_a_layer_that_runs_otherwise_the_second_time_is_refused() -> None:
    torch.manual_seed(0)
    layers = nn.ModuleList([Fickle()]).double().train()
    recompute, output = start(layers, inputs(), keep_products=True)
    recompute.choose(CHOSEN)
    with pytest.raises(RuntimeError, match="make the same calls in the same order"):
        weighted(output).backward()
