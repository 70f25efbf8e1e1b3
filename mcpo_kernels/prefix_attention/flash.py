"""flash-attn 2, 3 or 4, or the hub's build of one, by the door that transformers has to them all.

transformers knows where each package keeps its varlen kernel and what it calls its arguments. What
it would drop without a word, a window or sinks that the kernel at hand does not take, is refused
here. transformers is imported when the first call is made: ``import mcpo_kernels`` needs torch
alone.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from typing import TYPE_CHECKING, Any

import torch

from mcpo_kernels.prefix_attention import gather

if TYPE_CHECKING:
    from torch import Tensor

    from mcpo_kernels.prefix_attention.gather import Bounds
    from mcpo_kernels.prefix_attention.layout import PrefixLayout
    from mcpo_kernels.prefix_attention.scores import ScoreRule

# Newest first, but version 4 after 3 on the devices that 3 was written for; the first that is
# installed. Keyed by the major number of the device's compute capability.
PREFERENCE = {8: (2, 3), 9: (3, 4, 2)}
NEWER_DEVICES = (4, 2)


def package(device: torch.device, *, from_hub: bool) -> str | None:
    """The name that transformers has for the flash attention of this device; None if there is none.

    Args:
        device: a CUDA device.
        from_hub: whether one that the package ``kernels`` would download counts.
    """
    if importlib.util.find_spec("transformers") is None:
        return None
    utils: Any = importlib.import_module("transformers.utils")
    available = {
        2: utils.is_flash_attn_2_available,
        3: utils.is_flash_attn_3_available,
        4: utils.is_flash_attn_4_available,
    }
    major, _ = torch.cuda.get_device_capability(device)
    versions = PREFERENCE.get(major, NEWER_DEVICES if major > max(PREFERENCE) else ())
    for hub in (False, True) if from_hub else (False,):
        for version in versions:
            if available[version](kernels_fallback_ok=hub):
                return f"flash_attention_{version}"
    return None


def lacks(rule: ScoreRule, name: str) -> str | None:
    """What of the rule the kernel of this name does not take as an argument; None if nothing."""
    (_, kernel, *_), _ = _door().lazy_import_flash_attention(name)
    takes = inspect.signature(kernel).parameters
    if rule.window is not None and "window_size" not in takes:
        return "window"
    if rule.softcap is not None and "softcap" not in takes:
        return "softcap"
    if rule.sinks_H is not None and not {"s_aux", "learnable_sink"} & set(takes):
        return "sinks"
    return None


def attend(
    query_HTD: Tensor,
    key_HTD: Tensor,
    value_HTE: Tensor,
    layout: PrefixLayout,
    rule: ScoreRule,
    name: str,
) -> Tensor:
    """[H, T, E] in the dtype of the query, by the kernel that transformers calls ``name``."""

    def varlen(
        query: Tensor, key: Tensor, value: Tensor, bounds: Bounds, rule: ScoreRule
    ) -> Tensor:
        return _varlen((query, key, value), bounds, rule, name)

    return gather.attend(query_HTD, key_HTD, value_HTE, layout, rule, varlen)


def _varlen(
    tensors: tuple[Tensor, Tensor, Tensor], bounds: Bounds, rule: ScoreRule, name: str
) -> Tensor:
    query_THD, key_KHD, value_KHD = tensors
    options: dict[str, Any] = {}
    if rule.sinks_H is not None:
        options["s_aux"] = rule.sinks_H.to(query_THD.dtype)
    # The public function wants a module of transformers' to read from.
    output_1THD = _door()._flash_attention_forward(
        query_THD[None],
        key_KHD[None],
        value_KHD[None],
        None,
        query_length=len(query_THD),
        is_causal=True,
        softmax_scale=rule.scale,
        sliding_window=rule.window,
        softcap=rule.softcap,
        # None leaves it to the variable FLASH_ATTENTION_DETERMINISTIC.
        deterministic=torch.are_deterministic_algorithms_enabled() or None,
        cu_seq_lens_q=bounds.queries,
        cu_seq_lens_k=bounds.keys,
        max_length_q=bounds.most_queries,
        max_length_k=bounds.most_keys,
        attn_implementation=name,
        **options,
    )
    return output_1THD[0]


def _door() -> Any:
    return importlib.import_module("transformers.modeling_flash_attention_utils")
