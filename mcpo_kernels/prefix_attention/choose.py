"""Which implementation of prefix attention runs: an explicit choice, or one documented table."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

import torch

from mcpo_kernels.impl import parse_impl
from mcpo_kernels.prefix_attention import flash, varlen

if TYPE_CHECKING:
    from mcpo_kernels.prefix_attention.scores import ScoreRule

SIXTEEN_BITS = (torch.float16, torch.bfloat16)


class AttentionImpl(str, Enum):
    """Implementations of prefix attention.

    ``auto`` picks by this table, first row that fits; a row fits if the kernel takes what is asked
    of it (window, softcap, sinks) too:

    ======  =======  =========  ======  ==================================================
    device  dtype    installed  choice  reason
    ======  =======  =========  ======  ==================================================
    cuda    16 bits  flash-attn flash   one varlen call over gathered keys
    cuda    16 bits             varlen  the same by torch's own kernel: no softcap, sinks
    any     any                 sdpa    torch's attention, a call for each shape of piece
    ======  =======  =========  ======  ==================================================

    ``flex`` and ``reference`` run where they are asked for by name.
    """

    AUTO = "auto"
    REFERENCE = "reference"
    SDPA = "sdpa"
    FLASH = "flash"
    VARLEN = "varlen"
    FLEX = "flex"


class AttentionChoice(NamedTuple):
    """What ``resolve_attention`` decided."""

    impl: AttentionImpl
    reason: str
    package: str = ""
    """Of ``flash``: what transformers calls the kernel."""


def resolve_attention(
    impl: AttentionImpl | str, device: torch.device, dtype: torch.dtype, rule: ScoreRule
) -> AttentionChoice:
    """The implementation that runs for this request, and why.

    An explicit choice never falls back: it is returned as it is, or refused.

    Raises:
        ValueError: there is no such name.
        RuntimeError: the implementation asked for cannot run here.
    """
    wanted = parse_impl(AttentionImpl, impl)
    if wanted is AttentionImpl.AUTO:
        return _by_the_table(device, dtype, rule)
    if wanted is AttentionImpl.FLASH:
        choice, refusal = _flash(device, dtype, rule, from_hub=True)
    elif wanted is AttentionImpl.VARLEN:
        choice, refusal = _varlen(device, dtype, rule)
    else:
        choice, refusal = AttentionChoice(wanted, f"asked for: {wanted.value}"), ""
    if refusal:
        raise RuntimeError(
            f"impl={wanted.value!r} cannot run here: {refusal}; use 'sdpa' or 'auto'"
        )
    return choice


def _by_the_table(device: torch.device, dtype: torch.dtype, rule: ScoreRule) -> AttentionChoice:
    # One that would have to be downloaded is for those who ask for it.
    choice, no_flash = _flash(device, dtype, rule, from_hub=False)
    if not no_flash:
        return choice
    choice, no_varlen = _varlen(device, dtype, rule)
    if not no_varlen:
        return choice._replace(reason=f"auto: torch's varlen kernel; flash: {no_flash}")
    if device.type != "cuda":
        return AttentionChoice(AttentionImpl.SDPA, f"auto: torch's attention on {device.type}")
    reason = f"auto: torch's attention; flash: {no_flash}; varlen: {no_varlen}"
    return AttentionChoice(AttentionImpl.SDPA, reason)


def _flash(
    device: torch.device, dtype: torch.dtype, rule: ScoreRule, *, from_hub: bool
) -> tuple[AttentionChoice, str]:
    """The choice, and what speaks against it."""
    choice = AttentionChoice(AttentionImpl.FLASH, "flash-attn")
    if refusal := _not_for_varlen_kernels(device, dtype):
        return choice, refusal
    name = flash.package(device, from_hub=from_hub)
    if name is None:
        return choice, "no flash-attn for this device is installed, or transformers is not"
    lacking = flash.lacks(rule, name)
    if lacking is not None:
        return choice, f"the kernel of {name} takes no {lacking}"
    return AttentionChoice(AttentionImpl.FLASH, f"{name} by transformers", name), ""


def _varlen(
    device: torch.device, dtype: torch.dtype, rule: ScoreRule
) -> tuple[AttentionChoice, str]:
    choice = AttentionChoice(AttentionImpl.VARLEN, "torch's varlen kernel")
    lacking = varlen.lacks(rule)
    refusal = _not_for_varlen_kernels(device, dtype)
    return choice, refusal or (f"torch's varlen kernel takes no {lacking}" if lacking else "")


def _not_for_varlen_kernels(device: torch.device, dtype: torch.dtype) -> str:
    if device.type != "cuda":
        return f"it takes tensors on a CUDA device, got {device.type}"
    return "" if dtype in SIXTEEN_BITS else f"it takes float16 and bfloat16, got {dtype}"
