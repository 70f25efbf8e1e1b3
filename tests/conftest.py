"""What tests share: a tiny Llama with a word-level ChatML tokenizer, saved as any model is."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
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
from mcpo_kernels.linear_logprob.triton import entry, tiles

pytest_plugins = ("varlen_stand_ins",)

ROOT = Path(__file__).parents[1]
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


@pytest.fixture
def exact_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    """Softmax in the dtype of its input, where models ask for float32; see ``tiny_models``."""
    softmax, to_float = torch.softmax, torch.Tensor.float
    monkeypatch.setattr(
        torch.Tensor, "float", lambda t: t if t.dtype == torch.float64 else to_float(t)
    )
    monkeypatch.setattr(
        torch.nn.functional, "softmax", lambda logits, dim, **_: softmax(logits, dim)
    )


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


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The CUDA device of tests marked ``gpu``; where kernels are interpreted, the CPU."""
    if entry.INTERPRETED:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.fail("tests marked gpu need a CUDA device, and torch sees none; leave out `-m gpu`")
    return torch.device("cuda", 0)


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


@pytest.fixture
def narrow_slabs(monkeypatch):
    """Slabs of one tile instead of 256 MiB."""
    monkeypatch.setattr(tiles, "SCRATCH_MIB", 0)
    monkeypatch.setattr(tiles, "SLAB_MULTIPLE", 128)


@pytest.fixture
def arguments(
    tiny_folder: Path, candidates_file: Path, heldout_file: Path, tmp_path: Path
) -> dict[str, Any]:
    return {
        "model_name_or_path": tiny_folder,
        "train_data": candidates_file,
        "eval_data": heldout_file,
        "output_dir": tmp_path / "run",
        "reference_cache_dir": tmp_path / "cache",
        "bf16": "false",
        "learning_rate": 1e-3,
        "num_train_epochs": 2,
        "max_tokens_per_micro_batch": 64,
    }


def words(arguments: Mapping[str, Any]) -> list[str]:
    return [word for name, value in arguments.items() for word in (f"--{name}", str(value))]


def weights(output_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(output_dir / "model" / "model.safetensors")


def torchrun(
    arguments: Mapping[str, Any], processes: int, launcher: str = "", job: str = "-m mcpo.train"
) -> None:
    launch = f"torch.distributed.run --standalone --nproc-per-node {processes} {launcher} {job}"
    subprocess.run(
        [sys.executable, "-m", *launch.split(), *words(arguments)],
        check=True,
        cwd=ROOT,
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)},
    )
