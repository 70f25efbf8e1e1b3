"""The models that are trained, and copies of them that share their weights."""

from __future__ import annotations

import copy
from functools import partial

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from benchmarks.step.points import SMOLLM2, TINY
from mcpo import models

VOCABULARY = 97


def load(name: str, device: str = "cpu") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model in float32 in training mode, and its tokenizer. Where it is, its steps run.

    Raises:
        FileNotFoundError: the package that holds the weights is not installed.
    """
    if name == TINY:
        return _tiny(torch.device(device)), _words()
    model, tokenizer = models.load_model(
        models.SMOLLM2 if name == SMOLLM2 else name, dtype=torch.float32
    )
    nn.Module.to(model, device)
    return model.train(), tokenizer


def sharing(model: PreTrainedModel) -> PreTrainedModel:
    """A copy with code and gradients of its own, and the same weights in memory."""
    twin = copy.deepcopy(model)
    for own, shared in zip(twin.parameters(), model.parameters(), strict=True):
        own.data = shared.data
    return twin


def exact(model: PreTrainedModel) -> PreTrainedModel:
    """A copy that computes in float64 throughout, norms included."""
    twin = copy.deepcopy(model).double()
    for module in twin.modules():
        if hasattr(module, "variance_epsilon"):
            # Those of transformers normalise in float32 whatever they are given.
            module.forward = partial(_norm, module)
    return twin


def _norm(module: nn.Module, hidden: Tensor) -> Tensor:
    epsilon = module.variance_epsilon
    assert isinstance(epsilon, float)
    assert isinstance(module.weight, Tensor)
    return module.weight * hidden * (hidden.square().mean(-1, keepdim=True) + epsilon).rsqrt()


def _tiny(device: torch.device) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        # Larger than usual, so that probabilities are far from uniform.
        initializer_range=0.2,
    )
    model = LlamaForCausalLM(config)
    nn.Module.to(model, device)
    return model.train()


def _words() -> PreTrainedTokenizerBase:
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<bos>", "<eos>", "<unk>"])}
    vocabulary |= {f"w{index}": index for index in range(len(vocabulary), VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
    )
