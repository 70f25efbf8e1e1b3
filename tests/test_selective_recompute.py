"""The rules of a replay on layers made for the purpose; whole models are in test_recompute.py."""

from __future__ import annotations

import pytest
import torch
from replayed_layers import (
    CHOSEN,
    KEPT,
    LAYOUT,
    MASK,
    Block,
    D,
    T,
    assert_same,
    gradients,
    inputs,
    make_layers,
    plainly,
    run,
    start,
    weighted,
)
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.modeling_layers import GradientCheckpointingLayer

from mcpo_kernels import PrefixLayout, SelectiveRecompute
from mcpo_kernels.prefix_attention import cpu
from mcpo_kernels.prefix_attention.mask import PackedMask
from mcpo_kernels.selective_recompute import products


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
    # The input; the results of both linear layers; of attention that of two heads, with a
    # log-sum-exp each.
    numbers_of_a_row = D + (3 * D + D + D + 2 if keep_products else 0)
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
    # Of each layer the input, attention, and the product that stayed as it was.
    assert recompute.kept_bytes() == 2 * len(KEPT) * (D + D + D + 2) * 8
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


@pytest.mark.parametrize(("keep_products", "again"), [(True, 0), (False, 2)])
def test_attention_runs_once_where_its_results_are_kept(
    keep_products: bool, again: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two prompts and their chosen candidates have pieces of three shapes."""
    calls = []
    find = cpu._op

    def counted(part: str):
        op = find(part)
        return op if part else lambda *args, **kw: calls.append(args) or op(*args, **kw)

    monkeypatch.setattr(cpu, "_op", counted)
    layers, hidden = make_layers(2), inputs()
    recompute, output = start(layers, hidden, keep_products=keep_products)
    recompute.choose(CHOSEN)
    first = len(calls)
    assert first > 0
    weighted(output).backward()
    kept_shapes = len({tuple(args[0].shape) for args in calls[first:]})
    assert (len(calls) - first) == again * kept_shapes


def test_a_weight_is_cast_once_and_an_input_once_for_those_that_share_it() -> None:
    class Sharing(GradientCheckpointingLayer):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(D, D), nn.Linear(D, D)

        def forward(self, hidden):
            return hidden + self.one(hidden) * self.two(hidden)

    torch.manual_seed(0)
    layers, hidden = nn.ModuleList([Sharing()]).train(), inputs().detach().float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = layers[0](hidden)
    weighted(output).backward()
    plain = gradients(layers, hidden)
    recompute = SelectiveRecompute(layers, LAYOUT, keep_products=True)
    with Casts() as casts:
        with torch.autocast("cpu", dtype=torch.bfloat16), recompute.recording():
            output = layers[0](hidden)
        recompute.choose(CHOSEN)
        weighted(output).backward()
    # Weights, biases and the input of the first run; the input of the second, and the gradient of
    # what is added to the float32 residual.
    first, again = [(D, D), (D,), (1, T, D), (D, D), (D,)], [(1, len(KEPT), D)] * 2
    assert casts.to_bf16 == [*first, *again]
    for ours, theirs in zip(gradients(layers, hidden), plain, strict=True):
        # Sums over other numbers of rows may be rounded otherwise once, to bf16.
        assert (ours - theirs).abs().max() <= 2**-8 * theirs.abs().max()


class Casts(TorchDispatchMode):
    """Shapes of what is cast to bf16."""

    def __init__(self) -> None:
        super().__init__()
        self.to_bf16: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and kwargs.get("dtype") == torch.bfloat16:
            self.to_bf16.append(tuple(args[0].shape))
        return func(*args, **kwargs)


@pytest.mark.parametrize("bias", [None, torch.linspace(0, 1, 6)], ids=["plain", "bias"])
def test_float32_products_are_those_of_torch(bias: torch.Tensor | None) -> None:
    """Of operands that are transposed views too, as in a backward; oneDNN multiplies them."""
    torch.manual_seed(0)
    left, right = torch.randn(5, 8), torch.randn(8, 6)
    exact = left.double() @ right.double() + (0 if bias is None else bias.double())
    # Eight products, their sum and the bias, of numbers of the size of one.
    band = 9 * torch.finfo(torch.float32).eps * (left.abs() @ right.abs() + 1)
    for one in (left, left.T.contiguous().T):
        for other in (right.T, right.T.contiguous()):
            assert ((products.multiply(one, other, bias) - exact).abs() <= band).all()


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
