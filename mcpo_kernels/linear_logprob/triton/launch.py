"""What a launch depends on: the device, its family of tiles, the precision of products."""

from __future__ import annotations

import contextlib
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from mcpo_kernels.linear_logprob.triton import tiles, tuning

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping
    from contextlib import AbstractContextManager

    from torch import Tensor

# Contract a * b + c, one rounding less and an instruction less for every logit, whatever
# TRITON_DEFAULT_FP_FUSION or the default of a version says. Nothing here relies on two kernels
# rounding alike.
OPTIONS: dict[str, Any] = {"enable_fp_fusion": True}


class Launch(NamedTuple):
    """How the kernels of one call are launched."""

    family: str
    operands: str
    precision: str
    """Of products of float32; others are exact products in float32 sums whatever it says."""
    tiles: Mapping[str, tiles.Tile]
    """By the names of ``tiles.KERNELS``."""

    @classmethod
    def of(cls, tensor: Tensor) -> Launch:
        """For [N, D] tensors of this device and dtype, unless ``using`` says something else."""
        forced = _FORCED.get()
        if forced is not None:
            return forced
        family = family_of(tensor.device)
        operands = tuning.operands_of(tensor.dtype)
        precision = precision_of(family) if operands == "fp32" else "ieee"
        chosen = tuning.tiles_for(tensor.device, family, tensor.dtype, tensor.shape[1])
        return cls(family, operands, precision, chosen)

    def tile(self, kernel: str) -> tiles.Tile:
        """Of one of ``tiles.KERNELS``."""
        return self.tiles[kernel]

    def options(self, kernel: str) -> dict[str, Any]:
        """The keyword arguments of a launch that come from its tile."""
        tile = self.tile(kernel)
        return {
            "BLOCK_N": tile.block_n,
            "BLOCK_V": tile.block_v,
            "BLOCK_D": tile.block_d,
            "GROUP": tile.group,
            "PRECISION": self.precision,
            "num_warps": tile.num_warps,
            "num_stages": tile.num_stages,
            **OPTIONS,
        }


_FORCED: ContextVar[Launch | None] = ContextVar("_FORCED", default=None)


@contextlib.contextmanager
def using(launch: Launch) -> Generator[None]:
    """Calls inside are launched like this: for tuning, and for compiling without a device."""
    token = _FORCED.set(launch)
    try:
        yield
    finally:
        _FORCED.reset(token)


def family_of(device: torch.device) -> str:
    """The family of tiles of a device."""
    if device.type == "cpu":
        return tiles.INTERPRETER
    if torch.version.hip is not None:
        return "gfx942"
    capability = torch.cuda.get_device_capability(device)
    return {(8, 0): "sm80", (9, 0): "sm90", (10, 0): "sm100", (10, 3): "sm100"}.get(
        capability, "sm89"
    )


def precision_of(family: str) -> str:
    """Of float32 products, after ``torch.get_float32_matmul_precision()``.

    ``highest`` multiplies float32 as it is. On NVIDIA ``high`` splits operands into three products
    of tf32, and ``medium`` rounds operands to tf32. Matrix cores of AMD multiply float32 itself,
    and of its devices few know tf32: there it is always ``highest``. Where the precision was set
    by ``torch.backends``, which knows no ``medium``, tf32 is taken for ``high``.
    """
    if family in (tiles.INTERPRETER, "gfx942"):
        return "ieee"
    try:
        wanted = torch.get_float32_matmul_precision()
    except RuntimeError:
        # torch refuses to say it in the old words once the new ones were used.
        allowed = torch.backends.cuda.matmul.fp32_precision
        wanted = "high" if allowed == "tf32" else "highest"
    return {"highest": "ieee", "high": "tf32x3", "medium": "tf32"}[wanted]


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be that of the tensors."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
