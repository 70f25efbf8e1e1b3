"""Layers made for the tests of replays, over two prompts with candidates."""

from __future__ import annotations

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from mcpo_kernels import PrefixLayout, SelectiveRecompute, prefix_attention
from mcpo_kernels.prefix_attention.layout import PackedMask

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
