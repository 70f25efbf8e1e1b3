"""A configuration of any model type with few and narrow layers, one of each kind it has.

Windows, chunks and blocks are shorter than the sequences of ``compare.py``, so that a layer which
does not keep to them shows.
"""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

SPAN = 16
"""Tokens of a window, a chunk or a block."""
VOCAB = 97
LAYERS = 2

# What configurations of transformers call their sizes, and what they are here. A name that a class
# does not have is left out.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "text_vocab_size"), VOCAB),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embedding_size", "dim"), 64),
    **dict.fromkeys(("word_embed_proj_dim", "dim_model_base"), 64),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"), 96),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "intermediate_size_mlp"), 96),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), LAYERS),
    **dict.fromkeys(("decoder_layers", "encoder_layers", "num_blocks"), LAYERS),
    **dict.fromkeys(("num_decoder_layers", "num_encoder_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "global_head_dim", "v_head_dim", "kv_channels"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 512),
    # Experts.
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_num_experts", "moe_k"), 2),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk"), 2),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("shared_expert_intermediate_size", "shared_intermediate_size"), 32),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts"), 1),
    "first_k_dense_replace": 1,
    "num_zero_experts": 1,
    # Low ranks and split heads of MLA.
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    # States.
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "linear_key_head_dim"), 16),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size"), 8),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2),
    "linear_value_head_dim": 16,
    "lru_width": 64,
    # Reach.
    **dict.fromkeys(("sliding_window", "attention_chunk_size", "sliding_window_size"), SPAN),
    **dict.fromkeys(("attention_window_size", "window_size", "chunk_size"), SPAN),
    "compress_ratio": 4,
    "index_topk": 8,
    "index_head_dim": 16,
    "index_n_heads": 2,
    # Gemma's own.
    "hidden_size_per_layer_input": 16,
    "query_pre_attn_scalar": 16,
    "num_kv_shared_layers": 0,
    # Pictures and sound, which are never looked at or heard.
    "image_size": 28,
    "patch_size": 14,
    "max_source_positions": 64,
    # Dropout: scoring and training are one computation.
    **dict.fromkeys(("attention_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop"), 0.0),
    **dict.fromkeys(("dropout", "hidden_dropout", "hidden_dropout_prob"), 0.0),
    **dict.fromkeys(("attention_probs_dropout_prob", "activation_dropout"), 0.0),
    **dict.fromkeys(("layerdrop", "decoder_layerdrop", "encoder_layerdrop"), 0.0),
    # Of encoders, which are causal only where they are told so.
    "is_decoder": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Half of the layers take keys and values from earlier ones.
SHARED_KEYS: dict[str, Any] = {
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
}
# What a class needs besides, or otherwise.
OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "codegen": {"rotary_dim": 8},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0}},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_d_head": 16, "mamba_n_heads": 8},
    "gemma3n_text": SHARED_KEYS,
    "gemma4_text": SHARED_KEYS,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"head_dim": 8},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "minimax_m3_vl_text": {"layer_types": ["minimax_m3_sparse", "full_attention"]},
    "mpt": {"attn_config": {"attn_pdrop": 0}},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "roc_bert": {"pronunciation_vocab_size": VOCAB, "shape_vocab_size": VOCAB},
    "zaya": {"num_experts_per_tok": 1},
}
# Used where the class refuses some of the sizes: these are left out, one set after the other.
LEFT_OUT: tuple[frozenset[str], ...] = (
    frozenset(),
    frozenset({"head_dim"}),
    frozenset({"num_key_value_heads"}),
    frozenset({"sliding_window"}),
    frozenset({"head_dim", "num_key_value_heads", "sliding_window"}),
)


def small_config(model_type: str) -> PretrainedConfig:
    """The configuration, its text part shrunk and every other part too.

    Raises:
        Exception: of the class, where no set of sizes suits it.
    """
    kind = CONFIG_MAPPING[model_type]
    failure: Exception | None = None
    for left_out in LEFT_OUT:
        try:
            return _shrunk(kind, left_out)
        # Each class has its own way to say no.
        except Exception as error:
            failure = failure or error
    assert failure is not None
    raise failure


def _shrunk(kind: Any, left_out: frozenset[str]) -> PretrainedConfig:
    default = kind()
    own = OWN.get(kind.model_type, {})
    given = {
        name: value
        for name, value in SIZES.items()
        if name not in left_out and hasattr(default, name) and not _is_computed(kind, name)
    }
    if hasattr(default, "kv_lora_rank"):
        # Latent attention has a key head for each query head, of a width that is composed.
        given |= {"num_key_value_heads": given.get("num_attention_heads", 4)}
        given.pop("head_dim", None)
    types = None if _is_computed(kind, "layer_types") else getattr(default, "layer_types", None)
    if types:
        kinds = list(dict.fromkeys(types))
        given["layer_types"] = (kinds * LAYERS)[: max(LAYERS, len(kinds))]
        given["num_hidden_layers"] = len(given["layer_types"])
    for part, part_kind in getattr(kind, "sub_configs", {}).items():
        if part not in own and getattr(default, part, None) is not None:
            found = part_kind if hasattr(part_kind, "model_type") else type(getattr(default, part))
            given[part] = _shrunk(found, left_out).to_dict()
    return kind(**given | own)


def _is_computed(kind: Any, name: str) -> bool:
    mapped = getattr(kind, "attribute_map", {}).get(name, name)
    return any(isinstance(getattr(kind, each, None), property) for each in (name, mapped))
