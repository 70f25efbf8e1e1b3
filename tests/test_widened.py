"""Products of operands of two types, as a forward over weights gathered in bf16 meets them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional

from mcpo.widened import Widened

A, B = torch.randn(3, 4), torch.randn(4, 5)
C = torch.randn(5)


@pytest.mark.parametrize(
    "product",
    [
        lambda narrow: functional.linear(A, narrow(B.T)),
        lambda narrow: functional.linear(A, weight=narrow(B.T), bias=narrow(C)),
        lambda narrow: torch.addmm(narrow(C), A, narrow(B)),
        lambda narrow: A @ narrow(B),
        lambda narrow: torch.matmul(A, narrow(B)),
        lambda narrow: A.matmul(narrow(B)),
        lambda narrow: torch.bmm(A[None], narrow(B)[None])[0],
        lambda narrow: functional.layer_norm(A @ B, (5,), narrow(C), narrow(C)),
    ],
    ids=["linear", "bias", "addmm", "operator", "matmul", "method", "bmm", "layer_norm"],
)
def test_products_are_those_of_the_wider_type(product: Callable[..., torch.Tensor]) -> None:
    with Widened():
        found = product(lambda tensor: tensor.bfloat16())
    expected = product(lambda tensor: tensor.bfloat16().float())
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    with Widened():
        assert torch.equal(product(lambda tensor: tensor), product(lambda tensor: tensor))


def test_products_of_one_type_keep_it() -> None:
    with Widened():
        assert (A.bfloat16() @ B.bfloat16()).dtype == torch.bfloat16
