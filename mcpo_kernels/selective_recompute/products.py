"""Linear layers of a layer that runs twice: multiplied once, cast once, gone back through once.

On CPUs the weights that autocast casts are kept from the first run for the second, as autocast's
own cache keeps them without recompute. On other devices a cast is cheap and memory is not.
"""
# T packed tokens, R of them kept, D in, O out

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional


class Product(NamedTuple):
    """A linear layer that ran, besides its result."""

    weight: Tensor
    cast_OD: Tensor | None
    """In the dtype it was multiplied in, where that is another one and it is kept."""


class Inputs:
    """The last input as it was multiplied: layers that follow one another often share it."""

    def __init__(self) -> None:
        self._last: tuple[Tensor, int, Tensor] | None = None

    def cast(self, input: Tensor, dtype: torch.dtype) -> Tensor:
        """Without a graph."""
        if self._last is not None:
            last, version, cast = self._last
            if last is input and version == input._version and cast.dtype == dtype:
                return cast
        cast = input.detach().to(dtype)
        self._last = (input, input._version, cast)
        return cast


def linear(
    inputs: Inputs, input_1TD: Tensor, weight_OD: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Product]:
    """``linear(input, weight, bias)`` without a graph, and what a replay may use again.

    ``bias`` has torch's name, under which layers give it.
    """
    dtype = _autocast(input_1TD)
    used_OD = weight_OD.detach().to(_autocast(weight_OD))
    bias_O = None if bias is None else bias.detach().to(_autocast(bias))
    output_1TO = multiply(inputs.cast(input_1TD, dtype), used_OD, bias_O)
    kept = used_OD.dtype != weight_OD.dtype and used_OD.device.type == "cpu"
    return output_1TO, Product(weight_OD, used_OD if kept else None)


def known_linear(
    inputs: Inputs,
    product: Product,
    output_1RO: Tensor,
    input_1RD: Tensor,
    weight_OD: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """``linear(input, weight, bias)``, of which the value is known and the gradient is wanted."""
    used_OD = product.cast_OD
    if used_OD is None:
        used_OD = weight_OD.detach().to(_autocast(weight_OD))
    used_1RD = inputs.cast(input_1RD, _autocast(input_1RD))
    return _KnownLinear.apply(input_1RD, weight_OD, bias, output_1RO, used_1RD, used_OD)


class _KnownLinear(Function):
    @staticmethod
    def forward(ctx: Any, *tensors: Any) -> Tensor:
        input_1RD, weight_OD, bias_O, output_1RO, used_1RD, used_OD = tensors
        ctx.dtypes = tuple(
            None if tensor is None else tensor.dtype for tensor in (input_1RD, weight_OD, bias_O)
        )
        ctx.save_for_backward(used_1RD, used_OD)
        return output_1RO.view_as(output_1RO)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *doutputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        used_1RD, used_OD = ctx.saved_tensors
        doutput_RO = doutputs[0][0]
        dinput_1RD = dweight_OD = dbias_O = None
        if ctx.needs_input_grad[0]:
            dinput_1RD = multiply(doutput_RO, used_OD.T)[None].to(ctx.dtypes[0])
        if ctx.needs_input_grad[1]:
            dweight_OD = multiply(doutput_RO.T, used_1RD[0].T).to(ctx.dtypes[1])
        if ctx.needs_input_grad[2]:
            dbias_O = doutput_RO.sum(dim=0).to(ctx.dtypes[2])
        return dinput_1RD, dweight_OD, dbias_O, None, None, None


def multiply(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """``left @ right.T + bias``, by oneDNN for float32 on CPUs, where torch would ask MKL or BLAS.

    That is a tenth to a quarter faster on AMD's processors.
    """
    if _by_onednn(left) and _by_onednn(right):
        return torch.ops.mkldnn._linear_pointwise(left, right, bias, "none", [], "")
    return functional.linear(left, right, bias)


def _by_onednn(tensor: Tensor) -> bool:
    # Of a subclass, such as a DTensor, nobody knows what it makes of the op.
    plain = type(tensor) in (Tensor, nn.Parameter)
    return (
        plain
        and tensor.dtype == torch.float32
        and tensor.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        # Typed as a constant, and what ``torch.backends.mkldnn.flags`` sets.
        and bool(torch.backends.mkldnn.enabled)
    )


def _autocast(tensor: Tensor) -> torch.dtype:
    """The dtype in which autocast has a product multiplied; it leaves float64 alone."""
    device_type = tensor.device.type
    if tensor.dtype == torch.float64 or not torch.is_autocast_enabled(device_type):
        return tensor.dtype
    return torch.get_autocast_dtype(device_type)
