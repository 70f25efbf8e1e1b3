"""Make a model compute in float64 throughout, by asking for it wherever it asks for float32.

The norms, softmaxes, rotary angles and routers of transformers' models compute in float32 whatever
the weights are. Its rounding, 6e-8, would hide what float64 can show.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class _Float64(TorchFunctionMode):
    """Every float32 in the arguments of a torch function is replaced."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        args = tuple(_wider(argument) for argument in args)
        return func(*args, **{name: _wider(value) for name, value in (kwargs or {}).items()})


def _wider(argument: Any) -> Any:
    return torch.float64 if argument is torch.float32 else argument


@contextmanager
def float64_throughout() -> Generator[None]:
    """Inside, no torch function gives float32 where it was asked to."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Float64():
            yield
    finally:
        torch.set_default_dtype(before)
