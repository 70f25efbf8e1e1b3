"""Generation with a tiny random Llama, against one-row decoding without a cache."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mcpo.encode import encode_prompt, make_encoder
from mcpo.evaluate.generate import Draw, generate_batch, greedy, pick_tokens

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


@pytest.fixture
def encoder(tokenizer):
    return make_encoder(tokenizer, prompt_format="auto", chat_template=None)


def ids_of(prompts, encoder):
    return [encode_prompt(prompt, encoder, "p") for prompt in prompts]


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


def test_greedy_is_what_each_prompt_gives_alone(model, tokenizer, encoder):
    done = []
    prompt_ids = ids_of(PROMPTS, encoder)
    answers = greedy(
        model, encoder, prompt_ids, max_new_tokens=12, batch_size=2, on_progress=done.append
    )
    expected = [
        decode_alone(model, ids, 12, lambda logits, _: int(logits.argmax())) for ids in prompt_ids
    ]
    assert [a.text for a in answers] == [
        tokenizer.decode(ids, skip_special_tokens=True) for ids in expected
    ]
    assert [a.num_tokens for a in answers] == [len(ids) for ids in expected]
    assert [a.finished for a in answers] == [ids[-1] == EOS for ids in expected]
    assert done == [2, 2, 1]


def test_sampling_inverts_the_distribution_with_the_numbers_of_the_draw(model, tokenizer, encoder):
    draws = [
        [Draw(temperature=1.0, seed=10 * i + j) for j in range(3)] for i in range(len(PROMPTS))
    ]
    prompt_ids = ids_of(PROMPTS, encoder)
    groups = generate_batch(model, encoder, prompt_ids, draws, max_new_tokens=30)
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


def test_same_batch_same_text_and_other_seeds_other_text(model, encoder):
    ids = ids_of(PROMPTS, encoder)

    def texts(first_seed):
        draws = [[Draw(temperature=1.0, seed=first_seed + i)] for i in range(len(ids))]
        return generate_batch(model, encoder, ids, draws, max_new_tokens=10)

    assert texts(0) == texts(0)
    assert texts(0) != texts(100)


def test_greedy_works_under_autocast(model, encoder):
    prompt_ids = ids_of(PROMPTS, encoder)
    with torch.autocast("cpu", torch.bfloat16):
        answers = greedy(model, encoder, prompt_ids, max_new_tokens=5, batch_size=5)
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


def test_uneven_draws(model, encoder):
    with pytest.raises(ValueError, match=r"the same number of draws; got \[1, 2\]"):
        generate_batch(model, encoder, [[1], [2]], [[Draw()], [Draw()] * 2], max_new_tokens=2)


def test_several_tokens_may_end_an_answer(model, encoder, monkeypatch):
    prompt_ids = ids_of(["w1 w2 w3"], encoder)
    (free,) = greedy(model, encoder, prompt_ids, max_new_tokens=4, batch_size=1)
    second = int(free.text.split()[1][1:])
    monkeypatch.setattr(model.generation_config, "eos_token_id", [EOS, second])
    (ended,) = greedy(model, encoder, prompt_ids, max_new_tokens=4, batch_size=1)
    assert ended.finished
    assert ended.num_tokens <= 2


def test_an_answer_ends_where_training_ends_one(model, encoder):
    """A template may close turns with a token of its own, which no generation setting knows."""
    prompt_ids = ids_of(["w1 w2 w3"], encoder)
    (free,) = greedy(model, encoder, prompt_ids, max_new_tokens=4, batch_size=1)
    own = replace(encoder, end_id=int(free.text.split()[1][1:]))
    (ended,) = greedy(model, own, prompt_ids, max_new_tokens=4, batch_size=1)
    assert ended.finished
    assert ended.num_tokens <= 2
