"""What ``light`` keeps: products and casts on odd layers, and the ops of torch that it calls."""

from __future__ import annotations

import pytest
import torch
from replayed_layers import (
    CHOSEN,
    LAYOUT,
    D,
    T,
    assert_same,
    gradients,
    inputs,
    make_layers,
    start,
    weighted,
)
from torch import nn
from torch.nn import functional
from transformers.modeling_layers import GradientCheckpointingLayer

from mcpo_kernels import SelectiveRecompute, prefix_attention
from mcpo_kernels.selective_recompute import products


class Odd(GradientCheckpointingLayer):
    """A bias given by name, and a product as the last thing a layer does."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, hidden):
        mixed = functional.linear(hidden, self.one.weight, bias=self.one.bias)
        return self.two(mixed.tanh())


@pytest.mark.parametrize("keep_products", [False, True], ids=["selective", "light"])
def test_a_bias_by_name_and_a_product_that_is_the_output(keep_products: bool) -> None:
    torch.manual_seed(0)
    layers, hidden = nn.ModuleList([Odd(), Odd()]).double().train(), inputs()
    weighted(layers[1](layers[0](hidden))).backward()
    plain = gradients(layers, hidden)
    recompute = SelectiveRecompute(layers, LAYOUT, keep_products=keep_products)
    with recompute.recording():
        output = layers[1](layers[0](hidden))
    recompute.choose(CHOSEN)
    weighted(output).backward()
    assert_same(gradients(layers, hidden), plain)


def test_casts_of_weights_go_with_the_backward() -> None:
    torch.manual_seed(0)
    layers, hidden = nn.ModuleList([Odd()]).train(), inputs().detach().float().requires_grad_()
    recompute = SelectiveRecompute(layers, LAYOUT, keep_products=True)
    with torch.autocast("cpu", dtype=torch.bfloat16), recompute.recording():
        output = layers[0](hidden)
    recompute.choose(CHOSEN)
    loss = weighted(output.float())
    node = output.grad_fn
    assert [note.product.cast_OD.dtype for note in node.notes.calls] == [torch.bfloat16] * 2
    loss.backward(retain_graph=True)
    first = gradients(layers, hidden)
    assert [note.product.cast_OD for note in node.notes.calls] == [None, None]
    # A second backward casts again, to the same bits.
    loss.backward()
    for again, before in zip(gradients(layers, hidden), first, strict=True):
        assert torch.equal(again, before)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
@pytest.mark.parametrize("keep_products", [False, True], ids=["selective", "light"])
def test_a_gradient_of_a_gradient_is_refused(keep_products: bool) -> None:
    layers, hidden = make_layers(), inputs()
    _, output = start(layers, hidden, keep_products=keep_products)
    weighted(output).square().backward(create_graph=True)
    with pytest.raises(RuntimeError, match="not have been used in the graph"):
        torch.autograd.grad(hidden.grad.square().sum(), hidden)


def test_torchs_own_kernels_are_those_this_package_was_written_for(monkeypatch) -> None:
    """They have no public names: another release may change them, and then this says so first."""
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default._schema
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default._schema
    product = torch.ops.mkldnn._linear_pointwise.default._schema
    assert [each.name for each in forward.arguments] == [
        *("query", "key", "value", "dropout_p", "is_causal", "attn_mask", "scale")
    ]
    assert [each.name for each in backward.arguments] == [
        *("grad_out", "query", "key", "value", "out", "logsumexp", "dropout_p", "is_causal"),
        *("attn_mask", "scale"),
    ]
    assert [each.name for each in product.arguments] == [
        *("X", "W", "B", "attr", "scalars", "algorithm")
    ]
    monkeypatch.setattr(torch.ops, "aten", object())
    tensor = torch.zeros(T, 1, D)
    with pytest.raises(RuntimeError, match=r"needs aten::_scaled_dot_product_flash.*does not have"):
        prefix_attention(*[tensor.transpose(0, 1)] * 3, LAYOUT)


# Of another maker's processors.
@pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN")
def test_onednn_is_left_alone_where_it_is_switched_off() -> None:
    one = torch.ones(2, 3)
    assert products._by_onednn(one) == torch.backends.mkldnn.is_available()
    with torch.backends.mkldnn.flags(enabled=False):
        assert not products._by_onednn(one)
