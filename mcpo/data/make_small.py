"""Make the small verifiable task: ``python -m mcpo.data.make_small --output FOLDER``.

Trains a model from scratch on the texts of ``small_task.py``, lets it answer every prompt eight
times, and writes what ``mcpo.train`` takes: ``model/``, preference rows, and prompts with checks.
Minutes on one core; the same seed on the same machine gives the same files.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mcpo.data import small_task
from mcpo.data.make_verifiable import write_jsonl
from mcpo.data.prompts import VerifiablePrompt
from mcpo.data.verifiable_rows import Graded, Sample, candidate_row, grade, prompt_record

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SPLITS = (("train", 600), ("validation", 100), ("heldout", 200))
MODEL = "small-task"
SAMPLES, MAX_NEW_TOKENS, PROMPTS_PER_BATCH = 8, 40, 50
TEXTS, BATCH, EPOCHS, LEARNING_RATE = 8000, 64, 4, 3e-3
# Turns are words of their own, so that a tokenizer of whole words reads them.
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' <|end|> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
)


def main(argv: Sequence[str] | None = None) -> None:
    """Train, sample, check and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="where everything goes")
    parser.add_argument("--seed", type=int, default=0, help="of prompts, texts, model and samples")
    args = parser.parse_args(argv)
    prompts = small_task.build(SPLITS, args.seed)
    tokenizer = make_tokenizer()
    model = learn(tokenizer, prompts, args.seed)
    args.output.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(args.output / "model")
    tokenizer.save_pretrained(args.output / "model")
    graded = answer(model, tokenizer, prompts, args.seed)
    for split, _ in SPLITS:
        mine = [prompt for prompt in prompts if prompt.split == split]
        rows = [candidate_row(prompt, graded[prompt.prompt_id], MODEL) for prompt in mine]
        write_jsonl(args.output / f"{split}.jsonl", [row for row in rows if row is not None])
        write_jsonl(args.output / f"{split}_prompts.jsonl", map(prompt_record, mine))
        scores = [one.score == 1 for prompt in mine for one in graded[prompt.prompt_id]]
        found = sum(row is not None for row in rows)
        print(f"{split}: {found} rows, {sum(scores) / len(scores):.1%} of the samples pass")


def make_tokenizer() -> PreTrainedTokenizerBase:
    """One token for each word."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = ["<|pad|>", "<|end|>", "user", "assistant", *small_task.INSTRUCTING]
    words += [*small_task.WORDS, *small_task.NUMBERS, "10", "11", "12", ",", ".", "?"]
    tokenizer = Tokenizer(
        WordLevel({word: index for index, word in enumerate(words)}, unk_token="<|pad|>")
    )
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        unk_token="<|pad|>",
        eos_token="<|end|>",
        chat_template=TEMPLATE,
    )


def learn(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[VerifiablePrompt], seed: int
) -> PreTrainedModel:
    """A model of 200,000 parameters that has seen texts for the training prompts."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, get_scheduler

    draw = random.Random(seed)
    pairs = [_learnt_ids(tokenizer, prompt, draw) for prompt in _some(prompts, draw)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=96,
                intermediate_size=256,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=4,
                max_position_embeddings=256,
                tie_word_embeddings=True,
                pad_token_id=0,
                bos_token_id=None,
                eos_token_id=1,
            )
        )
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    steps = EPOCHS * -(-len(pairs) // BATCH)
    schedule: Any = get_scheduler(
        "cosine", optimizer, num_warmup_steps=20, num_training_steps=steps
    )
    for epoch in range(EPOCHS):
        draw.shuffle(pairs)
        losses: list[float] = []
        for start in range(0, len(pairs), BATCH):
            token_BL, label_BL = _padded(pairs[start : start + BATCH])
            loss: Any = model(input_ids=token_BL, labels=label_BL).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(loss.item())
        print(f"epoch {epoch + 1} of {EPOCHS}: loss {sum(losses) / len(losses):.3f}", flush=True)
    return model.eval()


def _some(prompts: Sequence[VerifiablePrompt], draw: random.Random) -> list[VerifiablePrompt]:
    return draw.choices([prompt for prompt in prompts if prompt.split == "train"], k=TEXTS)


def _learnt_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: VerifiablePrompt, draw: random.Random
) -> tuple[list[int], int]:
    """Token ids of a prompt with a text, and how many are the prompt's."""
    begin: list[int] = tokenizer.encode(f"user {prompt.text} <|end|> assistant")
    text = small_task.learnt_text(prompt, draw)
    return [*begin, *tokenizer.encode(f"{text} <|end|>")], len(begin)


def _padded(pairs: Sequence[tuple[list[int], int]]) -> tuple[Any, Any]:
    """[B, L] tokens, and labels that are -100 in prompts and padding."""
    import torch

    width = max(len(ids) for ids, _ in pairs)
    tokens = [[*ids, *[0] * (width - len(ids))] for ids, _ in pairs]
    labels = [[*[-100] * begin, *ids[begin:], *[-100] * (width - len(ids))] for ids, begin in pairs]
    return torch.tensor(tokens), torch.tensor(labels)


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[VerifiablePrompt],
    seed: int,
) -> dict[str, list[Graded]]:
    """Samples of every prompt at temperature 1, graded, by prompt."""
    from mcpo.data.make_verifiable import draw_seed
    from mcpo.encode import encode_prompt, make_encoder
    from mcpo.evaluate.generate import Draw, generate_batch

    encoder = make_encoder(tokenizer, prompt_format="auto", chat_template=None)
    graded: dict[str, list[Graded]] = {}
    for start in range(0, len(prompts), PROMPTS_PER_BATCH):
        batch = prompts[start : start + PROMPTS_PER_BATCH]
        groups = generate_batch(
            model,
            encoder,
            [encode_prompt(prompt.text, encoder, prompt.prompt_id) for prompt in batch],
            [
                [
                    Draw(temperature=1.0, seed=draw_seed(seed, prompt.prompt_id, 1.0, index))
                    for index in range(SAMPLES)
                ]
                for prompt in batch
            ],
            max_new_tokens=MAX_NEW_TOKENS,
        )
        for prompt, group in zip(batch, groups, strict=True):
            samples = [
                Sample(
                    text=one.text,
                    temperature=1.0,
                    index=index,
                    finished=one.finished,
                    num_tokens=one.num_tokens,
                )
                for index, one in enumerate(group)
            ]
            graded[prompt.prompt_id] = grade(prompt, samples)
    return graded


if __name__ == "__main__":
    main()
