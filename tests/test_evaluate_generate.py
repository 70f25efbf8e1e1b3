"""Generation with a tiny random Llama, against one-row decoding without a cache."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mcpo.evaluate.generate import (
    Draw,
    encode_prompt,
    generate_batch,
    greedy,
    pick_tokens,
)

EOS = 0
VOCAB = 40
PROMPTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9", "w3 w3", "w11 w2"]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=EOS,
        initializer_range=0.4,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def tokenizer():
    vocab = {"<eos>": EOS} | {f"w{i}": i for i in range(1, VOCAB)}
    words = Tokenizer(WordLevel(vocab, unk_token="w1"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>")


@torch.no_grad()
def decode_alone(model, ids, num_tokens, choose):
    """Token by token without cache, padding or company."""
    written = []
    for step in range(num_tokens):
        logits_V = model(input_ids=torch.tensor([[*ids, *written]])).logits[0, -1]
        written.append(choose(logits_V, step))
        if written[-1] == EOS:
            break
    return written


def test_greedy_is_what_each_prompt_gives_alone(model, tokenizer):
    done = []
    answers = greedy(
        model, tokenizer, PROMPTS, max_new_tokens=12, batch_size=2, on_progress=done.append
    )
    expected = [
        decode_alone(model, tokenizer(p)["input_ids"], 12, lambda logits, _: int(logits.argmax()))
        for p in PROMPTS
    ]
    assert [a.text for a in answers] == [
        tokenizer.decode(ids, skip_special_tokens=True) for ids in expected
    ]
    assert [a.num_tokens for a in answers] == [len(ids) for ids in expected]
    assert [a.finished for a in answers] == [ids[-1] == EOS for ids in expected]
    assert done == [2, 2, 1]


def test_sampling_inverts_the_distribution_with_the_numbers_of_the_draw(model, tokenizer):
    draws = [
        [Draw(temperature=1.0, seed=10 * i + j) for j in range(3)] for i in range(len(PROMPTS))
    ]
    prompt_ids = [encode_prompt(tokenizer, prompt) for prompt in PROMPTS]
    groups = generate_batch(model, tokenizer, prompt_ids, draws, max_new_tokens=30)
    for ids, group, group_draws in zip(prompt_ids, groups, draws, strict=True):
        for answer, draw in zip(group, group_draws, strict=True):
            uniform = torch.rand(30, generator=torch.Generator().manual_seed(draw.seed))
            written = decode_alone(
                model,
                ids,
                30,
                lambda logits, step, u=uniform: int(
                    (logits.softmax(-1).cumsum(-1) <= u[step]).sum()
                ),
            )
            assert answer.text == tokenizer.decode(written, skip_special_tokens=True)
            assert answer.num_tokens == len(written)
    finished = [answer.finished for group in groups for answer in group]
    assert any(finished)
    assert not all(finished)


def test_same_batch_same_text_and_other_seeds_other_text(model, tokenizer):
    ids = [encode_prompt(tokenizer, prompt) for prompt in PROMPTS]

    def texts(first_seed):
        draws = [[Draw(temperature=1.0, seed=first_seed + i)] for i in range(len(ids))]
        return generate_batch(model, tokenizer, ids, draws, max_new_tokens=10)

    assert texts(0) == texts(0)
    assert texts(0) != texts(100)


def test_greedy_works_under_autocast(model, tokenizer):
    with torch.autocast("cpu", torch.bfloat16):
        answers = greedy(model, tokenizer, PROMPTS, max_new_tokens=5, batch_size=5)
    assert all(1 <= answer.num_tokens <= 5 for answer in answers)


def test_temperatures_may_differ_within_a_batch():
    logits_BV = torch.log(torch.tensor([[0.1, 0.6, 0.3]] * 5))
    temperature_B = torch.tensor([0.0, 1.0, 1.0, 1.0, 0.01])
    uniform_B = torch.tensor([0.99, 0.05, 0.65, 0.999999, 0.99])
    assert pick_tokens(logits_BV, temperature_B, uniform_B).tolist() == [1, 0, 1, 2, 1]


def test_sampled_frequencies_are_those_of_the_softmax():
    torch.manual_seed(0)
    logits_V = torch.tensor([0.0, 1.0, 2.0, -1.0])
    picked = pick_tokens(logits_V.expand(20_000, 4), torch.full((20_000,), 0.7), torch.rand(20_000))
    shares = torch.bincount(picked, minlength=4) / 20_000
    torch.testing.assert_close(shares, (logits_V / 0.7).softmax(-1), atol=0.015, rtol=0)


def test_chat_template_and_conversation(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}w1 {{ m['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}w2{% endif %}"
    )
    assert encode_prompt(tokenizer, "w9") == [1, 9, 2]
    turns = ({"role": "user", "content": "w9"}, {"role": "assistant", "content": "w8"})
    assert encode_prompt(tokenizer, turns) == [1, 9, 1, 8, 2]


def test_conversation_without_chat_template(tokenizer):
    with pytest.raises(ValueError, match="a conversation needs a tokenizer with a chat template"):
        encode_prompt(tokenizer, ({"role": "user", "content": "w9"},))


def test_uneven_draws(model, tokenizer):
    with pytest.raises(ValueError, match=r"the same number of draws; got \[1, 2\]"):
        generate_batch(model, tokenizer, [[1], [2]], [[Draw()], [Draw()] * 2], max_new_tokens=2)


def test_no_token_that_ends_an_answer(model, tokenizer, monkeypatch):
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"neither model\.generation_config nor the tokenizer"):
        greedy(model, tokenizer, ["w1"], max_new_tokens=2, batch_size=1)


def test_several_tokens_may_end_an_answer(model, tokenizer, monkeypatch):
    (free,) = greedy(model, tokenizer, ["w1 w2 w3"], max_new_tokens=4, batch_size=1)
    second = int(free.text.split()[1][1:])
    monkeypatch.setattr(model.generation_config, "eos_token_id", [EOS, second])
    (ended,) = greedy(model, tokenizer, ["w1 w2 w3"], max_new_tokens=4, batch_size=1)
    assert ended.finished
    assert ended.num_tokens <= 2
