"""The rules of a replay on layers made for the purpose; whole models are in test_recompute.py."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers.modeling_layers import GradientCheckpointingLayer

from mcpo_kernels import PrefixLayout, prefix_attention
from mcpo_kernels.prefix_attention.layout import PackedMask
from mcpo_kernels.selective_recompute.api import SelectiveRecompute
from mcpo_kernels.selective_recompute.layer import poisoned

# Two prompts; segment 3 is a candidate of one token, which is no input.
LAYOUT = PrefixLayout((4, 3, 2, 0, 5, 2, 3, 1), (-1, 0, 0, 0, 0, -1, 5, 5))
CHOSEN = (1, 4, 7)
# Rows of segments 0, 1, 4, 5 and 7.
KEPT = [*range(7), *range(9, 16), 19]
T, D = LAYOUT.num_tokens, 8
MASK = PackedMask(LAYOUT, None)


class Block(GradientCheckpointingLayer):
    """Attention over the layout and a feed-forward, and a note of every input's shape."""

    def __init__(self, *, inplace: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.project, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D, bias=False)
        self.inplace, self.dropout = inplace, nn.Dropout(dropout)
        self.seen: list[torch.Tensor] = []

    def forward(self, hidden, *others, mask, **options):
        self.seen.append(hidden.detach())
        mixed = self.project(hidden)
        if self.inplace:
            mixed.mul_(2.0)
        query, key, value = mixed[0].T.reshape(3, 2, D // 2, -1).mT.unbind(0)
        attended = prefix_attention(query, key, value, mask.layout, window=mask.window)
        output = hidden + self.out(self.dropout(attended.transpose(0, 1).flatten(1)[None]).tanh())
        for other in others:
            output = output * other
        return output


def make_layers(count: int = 2, **settings) -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(Block(**settings) for _ in range(count)).double().train()


def inputs(seed: int = 1, *, grad: bool = True) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randn(1, T, D, generator=generator, dtype=torch.float64)
    return tensor.requires_grad_(grad)


def run(layers: nn.ModuleList, hidden: torch.Tensor, *others, **options) -> torch.Tensor:
    for layer in layers:
        hidden = layer(hidden, *others, mask=MASK, **options)
    return hidden


def weighted(output: torch.Tensor, rows=KEPT) -> torch.Tensor:
    """A loss that depends on some rows alone."""
    upstream = torch.linspace(-1, 1, len(rows) * D, dtype=output.dtype).view(len(rows), D)
    return (output[0, rows] * upstream).sum()


def gradients(layers: nn.ModuleList, *tensors: torch.Tensor) -> list[torch.Tensor | None]:
    leaves = [*layers.parameters(), *tensors]
    found = [None if leaf.grad is None else leaf.grad.clone() for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    return found


def assert_same(ours, plain) -> None:
    # Some hundred roundings of float64.
    assert len(ours) == len(plain)
    for mine, theirs in zip(ours, plain, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-13 * theirs.abs().max().item())


def plainly(layers: nn.ModuleList, hidden: torch.Tensor, *others) -> list[torch.Tensor | None]:
    weighted(run(layers, hidden, *others)).backward()
    return gradients(layers, hidden, *others)


def start(layers: nn.ModuleList, hidden, *others, keep_products=False, **options):
    recompute = SelectiveRecompute(layers, LAYOUT, keep_products=keep_products)
    with recompute.recording():
        output = run(layers, hidden, *others, **options)
    return recompute, output


@pytest.mark.parametrize("keep_products", [False, True], ids=["selective", "light"])
def test_a_replay_has_the_kept_rows_and_their_gradients(keep_products: bool) -> None:
    layers, hidden = make_layers(), inputs()
    plain = plainly(layers, hidden)
    firsts = [layer.seen.pop() for layer in layers]
    recompute, output = start(layers, hidden, keep_products=keep_products)
    kept = recompute.choose(CHOSEN)
    weighted(output).backward()
    assert kept.tolist() == KEPT
    for layer, first in zip(layers, firsts, strict=True):
        scored, replayed = layer.seen
        assert torch.equal(scored, first)
        assert torch.equal(replayed, first[:, KEPT])
    assert_same(gradients(layers, hidden), plain)
    assert hidden.grad is None


@pytest.mark.parametrize("keep_products", [False, True], ids=["selective", "light"])
def test_what_is_held_shrinks_with_the_choice_and_goes_with_the_backward(
    keep_products: bool,
) -> None:
    layers = make_layers(3)
    recompute, output = start(layers, inputs(), keep_products=keep_products)
    numbers_of_a_row = D + (3 * D + D if keep_products else 0)
    assert recompute.kept_bytes() == 3 * T * numbers_of_a_row * 8
    recompute.choose(CHOSEN)
    assert recompute.kept_bytes() == 3 * len(KEPT) * numbers_of_a_row * 8
    loss = weighted(output)
    loss.backward()
    # The graph is still referred to, and holds nothing any more.
    assert loss.grad_fn is not None
    assert recompute.kept_bytes() == 0


@pytest.mark.parametrize("keep_products", [False, True], ids=["selective", "light"])
def test_without_a_choice_everything_is_replayed(keep_products: bool) -> None:
    layers, hidden = make_layers(), inputs()
    plain = plainly(layers, hidden)
    for layer in layers:
        layer.seen.clear()
    _, output = start(layers, hidden, keep_products=keep_products)
    weighted(output).backward()
    assert [len(layer.seen[1][0]) for layer in layers] == [T, T]
    assert_same(gradients(layers, hidden), plain)


def test_choosing_everything_is_no_choice() -> None:
    layers, hidden = make_layers(), inputs()
    plain = plainly(layers, hidden)
    recompute, output = start(layers, hidden)
    assert recompute.choose(range(8)).tolist() == list(range(T))
    weighted(output).backward()
    assert_same(gradients(layers, hidden), plain)


def test_a_retained_graph_is_replayed_again() -> None:
    layers, hidden = make_layers(), inputs()
    recompute, output = start(layers, hidden)
    recompute.choose(CHOSEN)
    loss = weighted(output)
    loss.backward(retain_graph=True)
    once = gradients(layers, hidden)
    loss.backward()
    assert_same(gradients(layers, hidden), once)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_two_forwards_may_be_under_way() -> None:
    """Chosen in one order, gone back through in the other; gradients accumulate."""
    layers, first, second = make_layers(), inputs(1), inputs(2)
    expected = [
        a if b is None else a + b
        for a, b in zip(plainly(layers, first)[:-1], plainly(layers, second)[:-1], strict=True)
    ]
    one, output = start(layers, first)
    two, other = start(layers, second, keep_products=True)
    two.choose(CHOSEN)
    one.choose(CHOSEN)
    weighted(output).backward()
    weighted(other).backward()
    assert_same(gradients(layers), expected)


def test_an_error_leaves_the_layers_as_they_were() -> None:
    layers, hidden = make_layers(), inputs()
    plain = plainly(layers, hidden)
    recompute = SelectiveRecompute(layers, LAYOUT)
    with pytest.raises(ZeroDivisionError), recompute.recording():
        run(layers, hidden, 1 / 0)
    assert [layer.gradient_checkpointing for layer in layers] == [False, False]
    assert_same(plainly(layers, hidden), plain)
    with pytest.raises(RuntimeError, match="must surround one forward, and this one was used"):
        recompute.recording().__enter__()


def test_without_gradients_nothing_is_kept() -> None:
    layers = make_layers()
    recompute = SelectiveRecompute(layers, LAYOUT)
    with torch.no_grad(), recompute.recording():
        run(layers, inputs())
    assert recompute.kept_bytes() == 0


@pytest.mark.parametrize("frozen", [0, 1], ids=["weights below train", "lowest layer is frozen"])
def test_below_frozen_embeddings_layers_still_train(frozen: int) -> None:
    layers, hidden = make_layers(), inputs(grad=False)
    for layer in list(layers)[:frozen]:
        layer.requires_grad_(False)
    plain = plainly(layers, hidden)
    for layer in layers:
        layer.seen.clear()
    recompute, output = start(layers, hidden)
    recompute.choose(CHOSEN)
    weighted(output).backward()
    assert [len(layer.seen) for layer in layers] == [1, 2] if frozen else [2, 2]
    assert_same(gradients(layers, hidden), plain)


def test_further_tensors_get_their_gradients_too() -> None:
    """One with a row for each token, one without rows, neither contiguous."""
    layers, hidden = make_layers(), inputs()
    by_row = torch.linspace(1, 2, T * D).double().view(D, T).T[None].requires_grad_()
    by_column = torch.linspace(1, 2, 2 * D).double()[::2].requires_grad_()
    assert not by_row.is_contiguous()
    plain = plainly(layers, hidden, by_row, by_column)
    recompute, output = start(layers, hidden, by_row, by_column)
    recompute.choose(CHOSEN)
    weighted(output).backward()
    assert_same(gradients(layers, hidden, by_row, by_column), plain)


class Pair(Block):
    """Returns more than hidden states."""

    def forward(self, hidden, **options):
        output = super().forward(hidden, **options)
        return output, None, output.sum(dim=2), hidden


def test_a_layer_may_return_a_tuple() -> None:
    torch.manual_seed(0)
    layer, hidden = Pair().double().train(), inputs()

    def loss_of(outputs):
        return weighted(outputs[0]) + outputs[2][0, KEPT].square().sum() + outputs[3][0, 0, 0]

    loss_of(layer(hidden, mask=MASK)).backward()
    plain = gradients(nn.ModuleList([layer]), hidden)
    recompute = SelectiveRecompute([layer], LAYOUT)
    with recompute.recording():
        outputs = layer(hidden, mask=MASK)
    recompute.choose(CHOSEN)
    assert outputs[1] is None
    loss_of(outputs).backward()
    assert_same(gradients(nn.ModuleList([layer]), hidden), plain)


def test_windows_and_tables_by_row_are_cut_like_the_rows() -> None:
    seen = []

    class Asking(Block):
        def forward(self, hidden, **options):
            seen.append(options)
            return super().forward(hidden, mask=options["mask"])

    torch.manual_seed(0)
    layer = Asking().double().train()
    cosine = torch.arange(T * 2.0).view(1, T, 2)
    options = {
        "mask": PackedMask(LAYOUT, 2),
        "tables": (cosine, [cosine]),
        "named": {"position": torch.arange(T)},
        "nothing": None,
        "number": 3,
        "constant": torch.ones(1, 1, 2),
    }
    recompute = SelectiveRecompute([layer], LAYOUT)
    with recompute.recording():
        output = layer(inputs(), **options)
    recompute.choose(CHOSEN)
    weighted(output).backward()
    first, again = seen
    assert first["mask"] == PackedMask(LAYOUT, 2)
    assert again["mask"] == PackedMask(PrefixLayout((4, 3, 5, 2, 1), (-1, 0, 0, -1, 3)), 2)
    assert torch.equal(again["tables"][0], cosine[:, KEPT])
    assert torch.equal(again["tables"][1][0], cosine[:, KEPT])
    assert again["named"]["position"].tolist() == KEPT
    assert (again["nothing"], again["number"]) == (None, 3)
    assert again["constant"] is options["constant"]


def test_a_result_changed_in_place_is_computed_again() -> None:
    layers, hidden = make_layers(inplace=True), inputs()
    plain = plainly(layers, hidden)
    recompute, output = start(layers, hidden, keep_products=True)
    recompute.choose(CHOSEN)
    # Of each layer the input, and the product that stayed as it was.
    assert recompute.kept_bytes() == 2 * len(KEPT) * (D + D) * 8
    weighted(output).backward()
    assert_same(gradients(layers, hidden), plain)


def test_autocast_is_that_of_the_forward() -> None:
    """bf16 products in the replay too, whatever holds where backward is called."""
    dtypes = []

    class Noticing(Block):
        def forward(self, hidden, **options):
            dtypes.append(self.out(hidden).dtype)
            return super().forward(hidden, **options)

    torch.manual_seed(0)
    layers, hidden = nn.ModuleList([Noticing()]).train(), inputs().detach().float()
    recompute = SelectiveRecompute(layers, LAYOUT)
    with torch.autocast("cpu", dtype=torch.bfloat16), recompute.recording():
        output = run(layers, hidden)
    recompute.choose(CHOSEN)
    weighted(output).backward()
    assert dtypes == [torch.bfloat16, torch.bfloat16]
    assert layers[0].out.weight.grad.dtype == torch.float32
    assert layers[0].out.weight.grad.abs().max() > 0


class Router(GradientCheckpointingLayer):
    """Two experts, one for each token; the choice is near a tie on purpose."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(2, D, D))
        self.chosen: list[list[int]] = []
        self.tilt = 0.0

    def forward(self, hidden):
        score, choice = torch.stack([hidden[0].sum(1), -hidden[0].sum(1) + self.tilt], 1).topk(1)
        self.chosen.append(choice[:, 0].tolist())
        return hidden + score * functional.linear(hidden[0], self.experts[0]) * (1 + choice)


def test_tokens_go_to_the_experts_they_were_scored_with() -> None:
    """Even if rounding, here a tilt, would turn the router's mind."""
    torch.manual_seed(0)
    layer = Router().double().train()
    recompute = SelectiveRecompute([layer], LAYOUT)
    with recompute.recording():
        output = layer(inputs())
    recompute.choose(CHOSEN)
    layer.tilt = 1e6
    weighted(output).backward()
    scored, replayed = layer.chosen
    assert 0 < sum(scored) < T
    assert replayed == [scored[row] for row in KEPT]


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
    recompute, output = start(layers, inputs())
    recompute.choose(CHOSEN)
    with pytest.raises(RuntimeError, match="gradient reached rows that were not chosen"):
        (weighted(output) + torch.nan * output[0, row].sum()).backward()


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
    with pytest.raises(RuntimeError, match="same linear layers in the same order"):
        weighted(output).backward()
