"""Products in the wider of their operands' types, for an exact forward over weights in bf16.

A sharded engine may gather weights in bf16, for products in bf16. A forward that is to show how
much those round multiplies the same weights in float32, which torch's products do not do by
themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_PRODUCTS = frozenset(
    (
        functional.linear,
        functional.layer_norm,
        torch.addmm,
        torch.bmm,
        torch.matmul,
        torch.Tensor.matmul,
        torch.Tensor.__matmul__,
    )
)


class Widened(TorchFunctionMode):
    """Inside, operands of a product that differ in their type are cast to the wider one."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Call, after a cast where one is needed."""
        kwargs = kwargs or {}
        if func in _PRODUCTS:
            operands = [each for each in (*args, *kwargs.values()) if _is_float(each)]
            widest = max((each.dtype for each in operands), key=lambda dtype: dtype.itemsize)
            args = tuple(each.to(widest) if _is_float(each) else each for each in args)
            kwargs = {
                name: each.to(widest) if _is_float(each) else each for name, each in kwargs.items()
            }
        return func(*args, **kwargs)


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
