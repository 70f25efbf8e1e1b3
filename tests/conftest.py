"""What tests share: a tiny Llama with a word-level ChatML tokenizer, saved as any model is."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from mcpo_kernels.linear_logprob import cpu

# Implementations of the head behind the ops; "auto" takes one of them.
FUSED = (
    "chunked",
    pytest.param("cpu", marks=pytest.mark.skipif(not cpu.AVAILABLE, reason=cpu.REASON)),
)
WORDS = tuple(f"w{number}" for number in range(90))
CHATML = (
    "{% for m in messages %}{{ '<|im_start|> ' + m['role'] + ' ' + m['content'] + ' <|im_end|> ' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|> assistant ' }}{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerBase:
    special = ["<|pad|>", "<|unk|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {
        word: index for index, word in enumerate([*special, "user", "assistant", "system", *WORDS])
    }
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        unk_token="<|unk|>",
        eos_token="<|im_end|>",
        chat_template=CHATML,
    )


def build_model(seed: int = 0, *, tied: bool = True) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        eos_token_id=3,
        pad_token_id=0,
        bos_token_id=2,
        # Larger than usual, so that probabilities are far from uniform and a wrong mask shows.
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerBase:
    return build_tokenizer()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder as ``from_pretrained`` reads it."""
    folder = tmp_path_factory.mktemp("tiny")
    build_model().save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def candidate_lines(count: int, *, seed: int, prefix: str = "row") -> list[dict[str, object]]:
    """Rows of the ``candidates`` schema: ragged pools of 1 to 4, words the tokenizer knows."""
    draw = random.Random(seed)

    def text(least: int, most: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(least, most)))

    return [
        {
            "id": f"{prefix}-{number}",
            "prompt": text(2, 8),
            "completions": [
                {"text": text(1, 9), "rank": rank} for rank in range(1, draw.randint(3, 6))
            ],
        }
        for number in range(count)
    ]


def write_jsonl(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def candidates_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    return write_jsonl(path, candidate_lines(14, seed=0))


@pytest.fixture(scope="session")
def heldout_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "heldout.jsonl"
    return write_jsonl(path, candidate_lines(5, seed=1, prefix="held"))
