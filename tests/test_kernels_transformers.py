from __future__ import annotations

from functools import partial

import pytest
import torch
from tiny_models import CONFIGS, float64_model
from transformers import AttentionInterface
from transformers import masking_utils as masks

from mcpo_kernels import PrefixLayout
from mcpo_kernels.integrations.transformers import (
    ATTENTION_NAME,
    PackedMask,
    attention,
    packed,
    packed_mask,
    register,
)

PROMPTS = (9, 4)
CANDIDATES = ((5, 3, 5, 1), (7, 0, 7))
LAYOUT = PrefixLayout((9, 5, 3, 5, 1, 4, 7, 0, 7), (-1, 0, 0, 0, 0, -1, 5, 5, 5))


@pytest.fixture(autouse=True)
def registered():
    register()


@pytest.fixture
def make_model(exact_softmax):
    def make(name, *, checkpointing=False):
        model = float64_model(name)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return model

    return make


def make_tokens():
    """Per prompt its tokens, and per candidate its tokens."""
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randint(3, 61, (prompt,), generator=generator),
            [torch.randint(3, 61, (length,), generator=generator) for length in candidates],
        )
        for prompt, candidates in zip(PROMPTS, CANDIDATES, strict=True)
    ]


def logits_one_by_one(model):
    """[rows, V]: of every candidate, those of the last prompt token and of its own tokens."""
    return torch.cat(
        [
            model(input_ids=torch.cat([prompt, own])[None], use_cache=False).logits[
                0, len(prompt) - 1 :
            ]
            for prompt, candidates in make_tokens()
            for own in candidates
        ]
    )


def packed_inputs():
    tokens, positions = [], []
    for prompt, candidates in make_tokens():
        tokens += [prompt, *candidates]
        starts = [0] + [len(prompt)] * len(candidates)
        parts = [prompt, *candidates]
        positions += [
            start + torch.arange(len(part)) for start, part in zip(starts, parts, strict=True)
        ]
    return {
        "input_ids": torch.cat(tokens)[None],
        "position_ids": torch.cat(positions)[None],
        "use_cache": False,
    }


def logits_packed(model):
    with packed(LAYOUT):
        logits = model(**packed_inputs()).logits[0]
    rows = []
    for segment, parent in enumerate(LAYOUT.parents):
        if parent >= 0:
            last = LAYOUT.starts[parent] + LAYOUT.lengths[parent] - 1
            first = LAYOUT.starts[segment]
            rows += [last, *range(first, first + LAYOUT.lengths[segment])]
    return logits[rows]


def gradients(model, logits):
    model.zero_grad()
    upstream = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)
    logits.backward(upstream)
    named = model.named_parameters()
    return {name: weight.grad.clone() for name, weight in named if weight.grad is not None}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("name", CONFIGS)
def test_packed_equals_one_by_one(name, checkpointing, make_model):
    model = make_model(name, checkpointing=checkpointing)
    expected = logits_one_by_one(model)
    expected_gradients = gradients(model, expected)

    model.set_attn_implementation(ATTENTION_NAME)
    ours = logits_packed(model)
    # Outside of `packed`, where a checkpointed layer runs again.
    our_gradients = gradients(model, ours)

    # Some thousand roundings of float64; one of float32 is 6e-8.
    assert_close = partial(torch.testing.assert_close, rtol=0)
    assert_close(ours, expected, atol=1e-12 * expected.abs().max().item())
    assert our_gradients.keys() == expected_gradients.keys()
    for parameter, gradient in expected_gradients.items():
        assert_close(our_gradients[parameter], gradient, atol=1e-12 * gradient.abs().max().item())


@pytest.mark.parametrize("name", ["mistral", "gemma2"])
def test_the_window_matters_here(name, make_model):
    model = make_model(name)
    model.set_attn_implementation(ATTENTION_NAME)
    windowed = logits_packed(model)
    model.config.sliding_window = 1000
    assert not torch.allclose(logits_packed(model), windowed)


def ask(mask_function=masks.causal_mask_function, layout=LAYOUT, **options):
    tokens = layout.num_tokens
    arguments = {"batch_size": 1, "q_length": tokens, "kv_length": tokens} | options
    with packed(layout):
        return packed_mask(mask_function=mask_function, **arguments)


def test_layers_are_told_the_layout_and_the_window():
    assert ask() == PackedMask(LAYOUT, None)
    sliding = masks.sliding_window_causal_mask_function(4)
    assert ask(sliding, local_size=4) == PackedMask(LAYOUT, 4)


def chunked(size):
    return masks.chunked_causal_mask_function(size, torch.zeros(1, dtype=torch.int64))


class ChunkedConfig:
    attention_chunk_size = 8192


OTHER_MASKS = {
    "chunks": (chunked(8), {"local_size": 8}),
    "chunks longer than the input": (
        chunked(8192),
        {"local_size": 8192, "config": ChunkedConfig()},
    ),
    "both directions": (lambda b, h, q, k: q >= 0, {}),
    "a block in both directions": (lambda b, h, q, k: (k <= q) | ((q < 3) & (k < 3)), {}),
    "no first token": (lambda b, h, q, k: (k <= q) & (k > 0), {}),
    "a wider window": (masks.sliding_window_causal_mask_function(5), {"local_size": 4}),
    "a narrower window": (masks.sliding_window_causal_mask_function(3), {"local_size": 4}),
    "a window not told": (masks.sliding_window_causal_mask_function(4), {}),
    "a custom mask": (masks.causal_mask_function, {"use_vmap": True}),
}


@pytest.mark.parametrize(("function", "options"), OTHER_MASKS.values(), ids=OTHER_MASKS)
def test_other_masks_are_refused(function, options):
    with pytest.raises(NotImplementedError, match="neither causal nor a sliding window"):
        ask(function, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention_mask": torch.ones(1, 41)}, "no padding, so attention_mask must be None"),
        ({"batch_size": 2}, "one row of the layout's 41 tokens.*got 2 rows"),
        ({"q_length": 3, "kv_length": 3}, "got 1 rows, 3 queries and 3 keys"),
        ({"kv_length": 50}, "without a cache, got 1 rows, 41 queries and 50 keys"),
    ],
)
def test_input_that_does_not_fit_the_layout_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ask(**options)


def test_a_layout_is_needed_and_forgotten_afterwards(make_model):
    model = make_model("llama")
    model.set_attn_implementation(ATTENTION_NAME)
    with pytest.raises(ZeroDivisionError), packed(LAYOUT):
        raise ZeroDivisionError
    with pytest.raises(RuntimeError, match=r"needs a layout; call the model inside `with packed"):
        model(**packed_inputs())


def test_dropout_is_refused_in_training_only(make_model):
    model = make_model("llama")
    model.set_attn_implementation(ATTENTION_NAME)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    with packed(LAYOUT):
        with pytest.raises(NotImplementedError, match=r"dropout must be 0, got 0\.1"):
            model(**packed_inputs())
        model.eval()(**packed_inputs())


@pytest.mark.parametrize(
    "option", [{"position_bias": torch.zeros(1)}, {"is_causal": False}], ids=str
)
def test_options_that_would_be_lost_are_refused(option):
    tensors = torch.zeros(3, 1, 2, LAYOUT.num_tokens, 4).unbind(0)
    with pytest.raises(NotImplementedError, match="position bias or for attention to the future"):
        attention(torch.nn.Identity(), *tensors, PackedMask(LAYOUT, None), **option)


def test_a_mask_of_the_models_own_is_refused():
    tensors = torch.zeros(3, 1, 2, LAYOUT.num_tokens, 4).unbind(0)
    for mask in (None, torch.zeros(1, 1, 41, 41)):
        with pytest.raises(TypeError, match=r"Identity passed .* builds its masks by itself"):
            attention(torch.nn.Identity(), *tensors, mask)


def test_registering_again_does_no_harm():
    register()
    assert AttentionInterface()[ATTENTION_NAME] is attention
    assert masks.AttentionMaskInterface()[ATTENTION_NAME] is packed_mask
