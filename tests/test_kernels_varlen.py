"""Prefix attention by varlen kernels and by FlexAttention.

No kernel of flash-attn or of torch's varlen attention runs on a CPU. A stand-in with the signature
of the real one takes its place, behind the door that leads to the real one.
"""

from __future__ import annotations

import inspect

import pytest
import torch
from test_kernels_prefix_attention import HEADS, LAYOUTS, RULES, make_tensors
from torch.nn.attention import varlen as torch_varlen
from transformers import modeling_flash_attention_utils as door
from varlen_stand_ins import SIGNATURES, all_sequences

from mcpo_kernels import PrefixLayout, prefix_attention
from mcpo_kernels.prefix_attention import choose, flash, flex, gather, reference, sdpa, varlen
from mcpo_kernels.prefix_attention.choose import AttentionImpl, resolve_attention
from mcpo_kernels.prefix_attention.scores import ScoreRule

SINKS_OF = {"flash_attention_2": False, "flash_attention_3": False, "flash_attention_4": True}


def rule_of(rule, tensors) -> ScoreRule:
    width, sinks = tensors[0].shape[2], tensors[3] if len(tensors) == 4 else None
    scale = rule.get("scale", width**-0.5)
    return ScoreRule(scale, rule.get("window"), rule.get("softcap"), sinks)


def results(attend, layout, tensors, rule):
    query, key, value, *_ = tensors
    output = attend(query, key, value, layout, rule_of(rule, tensors))
    upstream = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return [output.detach(), *torch.autograd.grad(output, tensors, upstream)]


def assert_agree(attend, layout, tensors, rule) -> None:
    """Equal up to rounding in float64, as in the tests of the other implementations."""
    ours, exact = (results(each, layout, tensors, rule) for each in (attend, reference.attend))
    terms = layout.num_tokens + tensors[0].shape[-1]
    size = max((tensor.abs().max().item() for tensor in exact if tensor.numel()), default=0.0)
    tolerance = 2 * terms * torch.finfo(torch.float64).eps * max(size, 1.0)
    assert tolerance < 1e-12
    for actual, expected in zip(ours, exact, strict=True):
        assert actual.shape == expected.shape
        torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@pytest.fixture
def torch_attend(monkeypatch):
    real = inspect.signature(torch_varlen.varlen_attn)

    def kernel(*arguments, **options):
        given = real.bind(*arguments, **options).arguments
        left, right = given["window_size"]
        assert right == 0
        assert given["query"].shape[1] == given["key"].shape[1] or given["enable_gqa"]
        assert (given["max_q"], given["max_k"]) == (
            given["cu_seq_q"].diff().max(),
            given["cu_seq_k"].diff().max(),
        )
        return all_sequences(
            *arguments[:5], scale=given["scale"], left=left, softcap=None, sinks_H=None
        )

    monkeypatch.setattr(torch_varlen, "varlen_attn", kernel)
    return varlen.attend


@pytest.mark.parametrize("name", SINKS_OF)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_flash_agrees_with_the_reference(layout, rule, name, use_flash):
    rule = rule if SINKS_OF[name] else {part: rule[part] for part in rule if part != "sinks"}
    assert_agree(use_flash(name), layout, make_tensors(layout, sinks="sinks" in rule), rule)


@pytest.mark.parametrize("rule", [RULES["plain"], RULES["window 1"], RULES["window 3"]], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_varlen_agrees_with_the_reference(layout, rule, torch_attend):
    assert_agree(torch_attend, layout, make_tensors(layout), rule)


@pytest.mark.parametrize("impl", ["flash", "varlen"])
@pytest.mark.parametrize("widths", [(8, 8), (8, 5), (4, 8)], ids=str)
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_heads_and_widths(heads, widths, impl, use_flash, torch_attend):
    layout = LAYOUTS["ragged candidates"]
    attend = use_flash("flash_attention_2") if impl == "flash" else torch_attend
    for rule in (RULES["plain"], RULES["window 3"]):
        assert_agree(attend, layout, make_tensors(layout, heads, widths), rule)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_agrees_with_the_reference_forward(layout, rule):
    for heads, widths in ((HEADS["GQA"], (8, 8)), (HEADS["MHA"], (8, 5))):
        tensors = [t.detach() for t in make_tensors(layout, heads, widths, sinks="sinks" in rule)]
        ours, exact = (
            attend(*tensors[:3], layout, rule_of(rule, tensors))
            for attend in (flex.attend, reference.attend)
        )
        torch.testing.assert_close(ours, exact, rtol=0, atol=1e-12)


def test_flex_has_no_backward_on_the_cpu():
    layout = LAYOUTS["tree"]
    with pytest.raises(RuntimeError, match=r"impl='flex' cannot run here.*no backward on the CPU"):
        prefix_attention(*make_tensors(layout), layout, impl="flex")


def test_what_a_flash_kernel_would_drop_is_named(use_flash):
    plain = ScoreRule(1.0, None, None, None)
    for name, takes_sinks in SINKS_OF.items():
        use_flash(name)
        assert flash.lacks(plain, name) is None
        assert flash.lacks(plain._replace(window=3, softcap=2.0), name) is None
        lacking = flash.lacks(plain._replace(sinks_H=torch.zeros(2)), name)
        assert lacking == (None if takes_sinks else "sinks")
    SIGNATURES["bare"] = SIGNATURES["flash_attention_2"][:10]
    use_flash("bare")
    assert flash.lacks(plain._replace(window=3), "bare") == "window"
    assert flash.lacks(plain._replace(softcap=3.0), "bare") == "softcap"


def test_the_gather_is_made_once_for_all_layers_and_its_backward_needs_no_atomics(torch_attend):
    layout, device = LAYOUTS["two prompts"], torch.device("cpu")
    assert gather.make_gather(layout, 3, device) is gather.make_gather(layout, 3, device)
    made = gather.make_gather(layout, None, device)
    # The prompt and its first candidate, then each further candidate behind its prompt.
    assert made.bounds.queries.diff().tolist() == [9, 3, 8, 4]
    assert made.bounds.keys.diff().tolist() == [9, 9, 8, 9]
    near = gather.make_gather(PrefixLayout((1000, 50, 50), (-1, 0, 0)), 20, device)
    assert near.bounds.keys.diff().tolist() == [1050, 69]
    query, key, value = make_tensors(layout)
    output = varlen.attend(query, key, value, layout, ScoreRule(1.0, None, None, None))
    names = set()
    pending = [output.grad_fn]
    while pending:
        node = pending.pop()
        if node is not None and node.name() not in names:
            names.add(node.name())
            pending += [each for each, _ in node.next_functions]
    assert "CatBackward0" in names
    assert not any("Index" in name or "Gather" in name or "Scatter" in name for name in names)


CUDA, HALF = torch.device("cuda"), torch.bfloat16
PLAIN = ScoreRule(1.0, None, None, None)
CAPPED, SUNK = PLAIN._replace(softcap=2.0), PLAIN._replace(sinks_H=torch.zeros(2))


@pytest.mark.parametrize(
    ("device", "dtype", "rule", "installed", "impl"),
    [
        (torch.device("cpu"), HALF, PLAIN, "flash_attention_2", "sdpa"),
        (CUDA, HALF, PLAIN, "flash_attention_2", "flash"),
        (CUDA, HALF, CAPPED, "flash_attention_2", "flash"),
        (CUDA, HALF, SUNK, "flash_attention_2", "sdpa"),
        (CUDA, HALF, SUNK, "flash_attention_4", "flash"),
        (CUDA, torch.float32, PLAIN, "flash_attention_2", "sdpa"),
        (CUDA, HALF, PLAIN, None, "varlen"),
        (CUDA, HALF, PLAIN._replace(window=4), None, "varlen"),
        (CUDA, HALF, CAPPED, None, "sdpa"),
        (CUDA, HALF, SUNK, None, "sdpa"),
    ],
)
def test_the_table_of_auto(device, dtype, rule, installed, impl, monkeypatch, use_flash):
    use_flash(installed or "flash_attention_2")
    monkeypatch.setattr(choose.flash, "package", lambda device, from_hub: installed)
    choice = resolve_attention("auto", device, dtype, rule)
    assert choice.impl == AttentionImpl(impl)
    assert choice.reason
    assert choice.package == (installed if impl == "flash" else "")


@pytest.mark.parametrize(
    ("impl", "device", "dtype", "rule", "message"),
    [
        ("flash", "cpu", HALF, PLAIN, "'flash' cannot run here: it takes tensors on a CUDA device"),
        ("flash", "cuda", torch.float32, PLAIN, "it takes float16 and bfloat16, got torch.float32"),
        ("flash", "cuda", HALF, PLAIN, "no flash-attn for this device is installed"),
        ("varlen", "cpu", HALF, PLAIN, "'varlen' cannot run here: .* got cpu; use 'sdpa' or"),
        ("varlen", "cuda", HALF, CAPPED, "torch's varlen kernel takes no softcap"),
        ("varlen", "cuda", HALF, SUNK, "torch's varlen kernel takes no sinks"),
    ],
)
def test_an_explicit_choice_never_falls_back(impl, device, dtype, rule, message, monkeypatch):
    monkeypatch.setattr(choose.flash, "package", lambda device, from_hub: None)
    with pytest.raises(RuntimeError, match=message):
        resolve_attention(impl, torch.device(device), dtype, rule)


def test_an_explicit_flash_kernel_that_lacks_something_is_refused(monkeypatch, use_flash):
    use_flash("flash_attention_2")
    monkeypatch.setattr(choose.flash, "package", lambda device, from_hub: "flash_attention_2")
    with pytest.raises(RuntimeError, match="the kernel of flash_attention_2 takes no sinks"):
        resolve_attention("flash", CUDA, HALF, SUNK)


@pytest.mark.parametrize(
    ("major", "versions", "hub", "from_hub", "name"),
    [
        (8, {2, 4}, set(), False, "flash_attention_2"),
        (9, {2, 3, 4}, set(), False, "flash_attention_3"),
        (9, {2, 4}, set(), False, "flash_attention_4"),
        (10, {2, 3}, set(), False, "flash_attention_2"),
        (7, {2}, set(), False, None),
        (9, set(), {2}, False, None),
        (9, set(), {2}, True, "flash_attention_2"),
        (9, {2}, {3}, True, "flash_attention_2"),
    ],
)
def test_which_package_serves_a_device(major, versions, hub, from_hub, name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    for version in (2, 3, 4):
        monkeypatch.setattr(
            f"transformers.utils.is_flash_attn_{version}_available",
            lambda kernels_fallback_ok=False, version=version: (
                version in versions or (kernels_fallback_ok and version in hub)
            ),
        )
    assert flash.package(CUDA, from_hub=from_hub) == name


def test_the_door_of_transformers_takes_what_is_given_to_it():
    takes = inspect.signature(door._flash_attention_forward).parameters
    given = ("query_length", "is_causal", "softmax_scale", "sliding_window", "softcap")
    given += ("deterministic", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
    assert set(given) <= set(takes)
    assert "s_aux" in inspect.signature(door._process_flash_attention_kwargs).parameters


def test_sdpa_is_what_auto_takes_here():
    layout = LAYOUTS["tree"]
    tensors = [tensor.detach() for tensor in make_tensors(layout)]
    by_name, by_auto = (prefix_attention(*tensors, layout, impl=i) for i in ("sdpa", "auto"))
    assert torch.equal(by_name, by_auto)
    rule = ScoreRule(tensors[0].shape[2] ** -0.5, None, None, None)
    assert torch.equal(by_name, sdpa.attend(*tensors, layout, rule))
