"""Device and precision of a run, each chosen with its reason."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mcpo.config import ModelConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """Where a run computes and in what precision."""

    device: torch.device
    autocast_dtype: torch.dtype | None
    """dtype of the matrix products; None: that of the float32 weights."""
    reason: str


def place(config: ModelConfig, *, local_rank: int = 0, local_world_size: int = 1) -> Placement:
    """Choose device and precision.

    Raises:
        ValueError: the configured device does not exist, or several processes would share it.
    """
    device, why_device = _device(config.device, local_rank, local_world_size)
    if config.bf16 is not None:
        bf16, why_dtype = config.bf16, f"bf16={str(config.bf16).lower()} was given"
    else:
        bf16, why_dtype = _fast_bf16(device)
    return Placement(
        device=device,
        autocast_dtype=torch.bfloat16 if bf16 else None,
        reason=f"device {device}: {why_device}; {'bf16' if bf16 else 'fp32'} compute: {why_dtype}",
    )


def _device(name: str, local_rank: int, local_world_size: int) -> tuple[torch.device, str]:
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", local_rank), "torch sees a CUDA device"
        return torch.device("cpu"), "torch sees no CUDA device"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r} was asked for, but torch sees no CUDA device; use cpu")
    if name == "cuda":
        device = torch.device("cuda", local_rank)
    elif device.type == "cuda" and local_rank != device.index and local_world_size > 1:
        raise ValueError(
            f"each process needs a GPU of its own, got device {name!r} for {local_world_size} "
            "processes; use cuda or auto"
        )
    return device, "it was given"


def _fast_bf16(device: torch.device) -> tuple[bool, str]:
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return True, "the GPU multiplies bf16 natively"
        return False, "the GPU has no native bf16"
    if torch.cpu.get_capabilities().get("avx512_bf16"):
        return True, "the CPU multiplies bf16 natively (avx512_bf16)"
    return False, "the CPU has no bf16 matrix instructions"
