"""Tiny random models of many families that compute in float64 throughout."""

from __future__ import annotations

from functools import partial

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3MoeConfig,
)

WINDOW = 6
SIZES = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MIXED = {"layer_types": ["sliding_attention", "full_attention"]}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "mistral": MistralConfig(**SIZES, sliding_window=WINDOW),
    "gemma2": Gemma2Config(
        **SIZES, sliding_window=WINDOW, query_pre_attn_scalar=8, attn_logit_softcapping=2.0
    ),
    "gemma3": Gemma3TextConfig(**SIZES, **MIXED, sliding_window=WINDOW, query_pre_attn_scalar=8),
    "olmo2": Olmo2Config(**{name: size for name, size in SIZES.items() if name != "head_dim"}),
    "qwen3": Qwen3Config(**SIZES),
    "gpt_oss": GptOssConfig(
        **SIZES, sliding_window=WINDOW, num_local_experts=4, num_experts_per_tok=2
    ),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": Qwen3MoeConfig(
        **SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
    ),
}


def norm_in_float64(module: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    weight = 1.0 + module.weight if "Gemma" in type(module).__name__ else module.weight
    eps = getattr(module, "variance_epsilon", None) or module.eps
    return weight * hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + eps)


def float64_model(name: str) -> PreTrainedModel:
    """In training mode; the fixture ``exact_softmax`` does the rest.

    Those of transformers normalise, and in eager attention weigh, in float32; the rounding would
    hide errors a thousand million times larger than those of float64.
    """
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        CONFIGS[name],
        attn_implementation="eager",
        dtype=torch.float64,
        # The grouped GEMM of the experts has no float64.
        experts_implementation="eager",
    )
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = partial(norm_in_float64, module)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.train()
