"""Bare matrix products of a cell's shape: what its time is compared with.

Forward hidden @ weight.T, dhidden = dlogits @ weight, dweight = dlogits.T @ hidden: torch.mm into
memory that is there already. Each goes through the rows whole or 256 at a time, whichever was
faster when both were tried.
"""
# N scored tokens, D hidden, V vocabulary

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.measure import seconds_of
from benchmarks.workload import Inputs

CHUNK = 256
PRODUCTS = {
    "score": ("forward",),
    "train": ("forward", "dhidden", "dweight"),
    "mcpo": ("forward", "dhidden", "dweight"),
}
"""Those whose time each pattern is compared with."""
# Trying stops after as many seconds or calls.
TRIAL_SECONDS, MOST_TRIALS = 0.5, 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Product:
    """One product, and how many rows it takes at a time."""

    run: Callable[[], None]
    rows: int
    seconds: float
    device: str


def make_products(inputs: Inputs) -> dict[str, Product]:
    """Allocate the results and find the faster way of each product."""
    hidden_ND, weight_VD = inputs.hidden_ND.detach(), inputs.weight_VD.detach()
    logits_NV = torch.mm(hidden_ND, weight_VD.T)
    dhidden_ND, dweight_VD = torch.zeros_like(hidden_ND), torch.zeros_like(weight_VD)

    def forward(rows: int) -> None:
        for h, z in zip(hidden_ND.split(rows), logits_NV.split(rows), strict=True):
            torch.mm(h, weight_VD.T, out=z)

    def dhidden(rows: int) -> None:
        for z, dh in zip(logits_NV.split(rows), dhidden_ND.split(rows), strict=True):
            torch.mm(z, weight_VD, out=dh)

    def dweight(rows: int) -> None:
        pairs = zip(logits_NV.split(rows), hidden_ND.split(rows), strict=True)
        for number, (z, h) in enumerate(pairs):
            torch.addmm(dweight_VD, z.T, h, beta=float(number > 0), out=dweight_VD)

    ways = {"forward": forward, "dhidden": dhidden, "dweight": dweight}
    device = hidden_ND.device.type
    return {name: _faster(run, hidden_ND.shape[0], device) for name, run in ways.items()}


def time_products(products: dict[str, Product], pattern: str) -> dict[str, float]:
    """Seconds of the products that a pattern is compared with, once each."""
    compared = {name: products[name] for name in PRODUCTS[pattern]}
    return {name: seconds_of(product.run, product.device) for name, product in compared.items()}


def wall_seconds(products: dict[str, Product], pattern: str) -> float:
    """About how long that takes, where the machine has nothing else to do."""
    return sum(products[name].seconds for name in PRODUCTS[pattern])


def _faster(product: Callable[[int], None], num_tokens: int, device: str = "cpu") -> Product:
    ways = dict.fromkeys((min(CHUNK, num_tokens), num_tokens))
    tried = [_try(product, rows, device) for rows in ways]
    return min(tried, key=lambda way: way.seconds)


def _try(product: Callable[[int], None], rows: int, device: str = "cpu") -> Product:
    def run() -> None:
        product(rows)

    taken: list[float] = []
    while not taken or (sum(taken) < TRIAL_SECONDS and len(taken) < MOST_TRIALS):
        taken.append(seconds_of(run, device))
    return Product(run=run, rows=rows, seconds=min(taken), device=device)
