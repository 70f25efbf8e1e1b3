"""Which implementation runs: an explicit choice, or one documented table that gives its reason."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from mcpo_kernels.linear_logprob import cpu
from mcpo_kernels.linear_logprob.triton import entry as triton

if TYPE_CHECKING:
    import torch

Member = TypeVar("Member", bound=Enum)


class Impl(str, Enum):
    """Implementations of the fused linear log-probability.

    ``auto`` picks by this table, first row that fits:

    ======  ================  =======  ===================================================
    device  dtype             choice   reason
    ======  ================  =======  ===================================================
    cpu     any               cpu      compiled kernel; where the C++ extension was built
    cuda    any but float64   triton   Triton kernels; where triton is installed and runs
    any     any               chunked  portable torch; the logits are never held whole
    ======  ================  =======  ===================================================

    ROCm devices are called ``cuda`` too, as torch does.
    """

    AUTO = "auto"
    REFERENCE = "reference"
    CHUNKED = "chunked"
    CPU = "cpu"
    TRITON = "triton"


class Resolution(NamedTuple):
    """What ``resolve`` decided."""

    impl: Impl
    reason: str


class Availability(NamedTuple):
    """Whether an implementation can run here, and why or why not."""

    available: bool
    reason: str


def parse_impl(kind: type[Member], impl: Member | str) -> Member:
    """The member of ``kind`` named ``impl``.

    Raises:
        ValueError: there is no such name.
    """
    try:
        return kind(impl)
    except ValueError:
        valid = ", ".join(repr(member.value) for member in kind)
        raise ValueError(f"impl must be one of {valid}, got {impl!r}") from None


def available_impls() -> dict[Impl, Availability]:
    """Every implementation with whether it can run here and the reason, ``auto`` left out."""
    return {
        Impl.REFERENCE: Availability(True, "plain torch with autograd; holds the logits whole"),
        Impl.CHUNKED: Availability(True, "portable torch; the logits are never held whole"),
        Impl.CPU: Availability(cpu.AVAILABLE, cpu.REASON),
        Impl.TRITON: Availability(*triton.availability()),
    }


def resolve(impl: Impl | str, device: torch.device, dtype: torch.dtype) -> Resolution:
    """The implementation that runs for this request, and why.

    An explicit choice never falls back: it is returned as it is, or refused.

    Args:
        impl: a member of ``Impl`` or its name.
        device: where the tensors are.
        dtype: of ``hidden``.

    Raises:
        ValueError: there is no such name.
        RuntimeError: the implementation asked for cannot run here.
    """
    wanted = parse_impl(Impl, impl)
    if wanted is Impl.AUTO:
        return _choose(device, dtype)
    found = available_impls()
    if not found[wanted].available:
        usable = ", ".join(repr(name.value) for name, state in found.items() if state.available)
        raise RuntimeError(
            f"impl={wanted.value!r} cannot run here: {found[wanted].reason}; "
            f"use one of {usable}, or 'auto'"
        )
    refusal = _refusal(wanted, device, dtype)
    if refusal is not None:
        raise RuntimeError(
            f"impl={wanted.value!r} cannot run here: {refusal}; use 'chunked' or 'auto'"
        )
    return Resolution(wanted, f"asked for: {wanted.value}")


def _refusal(impl: Impl, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why an implementation does not take such tensors, or None."""
    if impl is Impl.TRITON:
        return triton.refusal(device, dtype)
    if impl is Impl.CPU and device.type != "cpu":
        return f"it takes tensors on the CPU, got {device.type}"
    return None


def _choose(device: torch.device, dtype: torch.dtype) -> Resolution:
    if device.type == "cpu":
        if cpu.AVAILABLE:
            return Resolution(Impl.CPU, f"auto: {cpu.REASON}, for {dtype}")
        return Resolution(Impl.CHUNKED, f"auto: portable torch for {dtype}; {cpu.REASON}")
    if device.type == "cuda":
        available, reason = triton.availability()
        refusal = triton.refusal(device, dtype) if available else reason
        if refusal is None:
            return Resolution(Impl.TRITON, f"auto: {reason}, for {dtype}")
        return Resolution(Impl.CHUNKED, f"auto: portable torch for {dtype}; triton: {refusal}")
    reason = f"auto: portable torch is what there is for {dtype} on {device.type}"
    return Resolution(Impl.CHUNKED, reason)
