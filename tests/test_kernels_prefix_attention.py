from __future__ import annotations

import random

import pytest
import torch

from mcpo_kernels import PrefixLayout, prefix_attention
from mcpo_kernels.prefix_attention import pieces, plan, sdpa
from mcpo_kernels.prefix_attention.reference import visible

LAYOUTS = {
    "one sequence": PrefixLayout((11,), (-1,)),
    "one token": PrefixLayout((1,), (-1,)),
    "no tokens": PrefixLayout((0, 0), (-1, 0)),
    "varlen": PrefixLayout.varlen((3, 1, 7, 0, 3)),
    "equal candidates": PrefixLayout((9, 4, 4, 4, 4), (-1, 0, 0, 0, 0)),
    "ragged candidates": PrefixLayout((9, 5, 2, 7, 1), (-1, 0, 0, 0, 0)),
    "two prompts": PrefixLayout((6, 3, 3, 5, 3, 4), (-1, 0, 0, -1, 3, 3)),
    "empty segments": PrefixLayout((0, 3, 0, 2, 4, 0), (-1, 0, 1, 2, 1, 4)),
    "tree": PrefixLayout((5, 3, 2, 4, 2, 3, 2), (-1, 0, 1, 1, 0, 4, 3)),
    "parent far back": PrefixLayout((4, 6, 3, 2), (-1, -1, 0, 1)),
}
HEADS = {"MHA": (4, 4), "GQA": (6, 2), "MQA": (3, 1)}
RULES = {
    "plain": {},
    "scale": {"scale": 0.7},
    "window 1": {"window": 1},
    "window 3": {"window": 3},
    "window 5": {"window": 5},
    "window beyond all": {"window": 1000},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": True},
    "all": {"scale": 0.7, "window": 4, "softcap": 2.0, "sinks": True},
}


def make_tensors(layout, heads=(4, 2), widths=(8, 8), dtype=torch.float64, *, sinks=False):
    """(query, key, value) or (query, key, value, sinks), all requiring gradients."""
    generator = torch.Generator().manual_seed(layout.num_tokens)
    (num_heads, num_key_heads), (num_keys, num_values) = heads, widths
    sizes = [
        (num_heads, layout.num_tokens, num_keys),
        (num_key_heads, layout.num_tokens, num_keys),
        (num_key_heads, layout.num_tokens, num_values),
    ]
    if sinks:
        sizes.append((num_heads,))
    tensors = [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]
    return [tensor.to(dtype).requires_grad_() for tensor in tensors]


def results(impl, layout, tensors, rule):
    query, key, value, *sinks = tensors
    rule = {name: setting for name, setting in rule.items() if name != "sinks"}
    sink_logits = sinks[0] if sinks else None
    output = prefix_attention(query, key, value, layout, **rule, sinks=sink_logits, impl=impl)
    upstream = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return [output.detach(), *torch.autograd.grad(output, tensors, upstream)]


def assert_agree(layout, tensors, rule):
    """Equal up to rounding in float64.

    Every number is a sum of at most T + D products (T of weights, D of a score) of terms below
    ``size``, so n roundings at that size bound each side's error.
    """
    ours, exact = (results(impl, layout, tensors, rule) for impl in ("sdpa", "reference"))
    terms = layout.num_tokens + tensors[0].shape[-1]
    size = max((tensor.abs().max().item() for tensor in exact if tensor.numel()), default=0.0)
    tolerance = 2 * terms * torch.finfo(torch.float64).eps * max(size, 1.0)
    assert tolerance < 1e-12
    for actual, expected in zip(ours, exact, strict=True):
        assert actual.shape == expected.shape
        torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_sdpa_agrees_with_the_reference(layout, rule):
    assert_agree(layout, make_tensors(layout, sinks="sinks" in rule), rule)


@pytest.mark.parametrize("rule", [RULES["plain"], RULES["window 3"], RULES["all"]], ids=str)
@pytest.mark.parametrize("widths", [(8, 8), (8, 5), (4, 8)], ids=str)
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_heads_and_widths(heads, widths, rule):
    layout = LAYOUTS["ragged candidates"]
    assert_agree(layout, make_tensors(layout, heads, widths, sinks="sinks" in rule), rule)


@pytest.mark.parametrize("seed", range(30))
def test_random_trees(seed):
    rng = random.Random(seed)
    num_segments = rng.randint(1, 9)
    lengths = tuple(rng.choice([0, 1, 2, 5, 5, 9]) for _ in range(num_segments))
    parents = tuple(rng.randrange(-1, segment) for segment in range(num_segments))
    layout = PrefixLayout(lengths, parents)
    rule = rng.choice(list(RULES.values()))
    assert_agree(layout, make_tensors(layout, sinks="sinks" in rule), rule)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_runs_longer_than_a_block(layout, rule, monkeypatch):
    monkeypatch.setattr(sdpa, "EXPLICIT_BLOCK", 4)
    monkeypatch.setattr(pieces, "MIN_WINDOW_BLOCK", 2)
    assert_agree(layout, make_tensors(layout, sinks="sinks" in rule), rule)


@pytest.mark.parametrize("rule", [RULES["plain"], RULES["window 3"], RULES["all"]], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_error_at_most_twice_that_of_the_reference_in_the_same_dtype(dtype, rule):
    layout = LAYOUTS["tree"]
    tensors = make_tensors(layout, dtype=dtype, sinks="sinks" in rule)
    exact = results(
        "reference", layout, [t.detach().double().requires_grad_() for t in tensors], rule
    )
    plain = results("reference", layout, tensors, rule)
    for ours, naive, oracle in zip(
        results("sdpa", layout, tensors, rule), plain, exact, strict=True
    ):
        assert ours.dtype == dtype
        # The band: torch's kernel rounds the weights to the dtype of the values as well.
        band = 2 * torch.finfo(dtype).eps * oracle.abs().max()
        assert (ours - oracle).abs().max() <= 2 * (naive - oracle).abs().max() + band


@pytest.mark.parametrize("rule", [RULES["plain"], RULES["all"]], ids=str)
@pytest.mark.parametrize("impl", ["sdpa", "reference"])
def test_autocast_does_not_round_the_scores(impl, rule):
    layout = LAYOUTS["tree"]
    query, key, value, *sinks = make_tensors(layout, dtype=torch.float32, sinks="sinks" in rule)
    options = dict(rule, sinks=sinks[0] if sinks else None, impl=impl)
    plain = prefix_attention(query, key, value, layout, **options)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(prefix_attention(query, key, value, layout, **options), plain)


@pytest.mark.parametrize("rule", [RULES["plain"], RULES["window 5"], RULES["all"]], ids=str)
def test_a_segment_gets_what_it_would_get_in_its_own_sequence(rule):
    layout = LAYOUTS["tree"]
    tensors = make_tensors(layout, sinks="sinks" in rule)
    packed, *_ = results("sdpa", layout, tensors, rule)
    for segment, (start, length) in enumerate(zip(layout.starts, layout.lengths, strict=True)):
        chain = [*layout.ancestors(segment), segment]
        tokens = torch.cat([layout.starts[s] + torch.arange(layout.lengths[s]) for s in chain])
        alone = [t.detach()[:, tokens].requires_grad_() for t in tensors[:3]] + tensors[3:]
        sequence, *_ = results("reference", PrefixLayout((len(tokens),), (-1,)), alone, rule)
        torch.testing.assert_close(
            packed[:, start : start + length],
            sequence[:, len(tokens) - length :],
            rtol=0,
            atol=1e-13,
        )


def test_a_token_sees_its_ancestors_and_nothing_else():
    seen = visible(PrefixLayout((2, 1, 2), (-1, 0, 0)), None, torch.device("cpu"))
    assert seen.int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 0, 1, 0],
        [1, 1, 0, 1, 1],
    ]
    near = visible(PrefixLayout((2, 1, 2), (-1, 0, 0)), 2, torch.device("cpu"))
    assert near.int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 1, 1, 0, 0],
        [0, 1, 0, 1, 0],
        [0, 0, 0, 1, 1],
    ]


def test_nan_stays_within_the_sequences_it_is_in():
    layout = LAYOUTS["two prompts"]
    query, key, value = (t.detach() for t in make_tensors(layout))
    clean = prefix_attention(query, key, value, layout, impl="sdpa")
    # The first token of the first candidate.
    value[:, 6] = torch.nan
    poisoned = prefix_attention(query, key, value, layout, impl="sdpa")
    assert poisoned[:, 6:9].isnan().all()
    assert torch.equal(poisoned[:, 9:], clean[:, 9:])


def calls(layout, window=None, block=None):
    """(pieces, queries, keys) of every call."""
    made = plan.make_plan(layout, window, block)
    return [
        (
            len(group),
            sum(made.part_lengths[part] for part in group[0].queries),
            sum(made.part_lengths[part] for part in group[0].keys),
        )
        for group in made.groups
    ]


def test_first_candidate_is_one_sequence_with_its_prompt_and_equal_ones_share_a_call():
    assert calls(LAYOUTS["equal candidates"]) == [(1, 13, 13), (3, 4, 13)]
    assert calls(PrefixLayout((9, 0, 4, 4), (-1, 0, 0, 0))) == [(1, 13, 13), (1, 4, 13)]
    assert calls(PrefixLayout.varlen((3, 5, 3))) == [(2, 3, 3), (1, 5, 5)]


def test_cost_follows_the_pairs_that_attend():
    long = PrefixLayout((1000, 50, 50), (-1, 0, 0))
    cells = sum(pieces * queries * keys for pieces, queries, keys in calls(long, 100, 100))
    assert cells <= 1100 * 200
    halved = sum(pieces * queries * keys for pieces, queries, keys in calls(long, None, 100))
    assert halved <= 1050 * 1150 / 2 + 50 * 1050
    assert calls(PrefixLayout((1000, 50, 50), (-1, 0, 0)), 20, None)[1] == (1, 50, 69)


BAD_ARGUMENTS = {
    "batched": (lambda q, k, v: (q[None], k[None], v[None]), ValueError, r"pass query\[0\]"),
    "heads": (lambda q, k, v: (q[:3], k, v), ValueError, "must divide.*got 2 and 3"),
    "tokens": (lambda q, k, v: (q, k[:, :3], v), ValueError, r"got \[4, 11, 8\], \[2, 3, 8\]"),
    "layout": (lambda q, k, v: (q[:, :5], k[:, :5], v[:, :5]), ValueError, "got 11 and 5"),
    "dtype": (lambda q, k, v: (q, k.float(), v), TypeError, "must have one dtype, got"),
    "device": (lambda q, k, v: (q, k.to("meta"), v), ValueError, "on one device, got cpu, meta"),
}
BAD_RULES = {
    "window": ({"window": 0}, "window must be >= 1, or None to see all, got 0"),
    "softcap": ({"softcap": -1.0}, "softcap must be > 0, or None for no cap, got -1.0"),
    "sinks": ({"sinks": torch.zeros(2)}, r"sinks must be \[H = 4\], got \[2\]"),
    "impl": ({"impl": "fast"}, "impl must be one of 'auto', 'reference', 'sdpa', .*, got 'fast'"),
}


@pytest.mark.parametrize(("change", "error", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_bad_tensors_are_explained(change, error, message):
    layout = LAYOUTS["one sequence"]
    with pytest.raises(error, match=message):
        prefix_attention(*change(*make_tensors(layout)), layout)


@pytest.mark.parametrize(("rule", "message"), BAD_RULES.values(), ids=BAD_RULES)
def test_bad_rules_are_explained(rule, message):
    layout = LAYOUTS["one sequence"]
    with pytest.raises(ValueError, match=message):
        prefix_attention(*make_tensors(layout), layout, **rule)
