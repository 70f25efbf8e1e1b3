"""The sweep over model types, on some of them; what it says is what docs/models.md says."""

from __future__ import annotations

import logging

import pytest
import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from benchmarks.models import compare
from benchmarks.models.__main__ import within
from benchmarks.models.compare import Verdict, examine
from benchmarks.models.double import float64_throughout
from benchmarks.models.rows import PAGE, RESULTS, page, read
from benchmarks.models.small import SPAN, small_config
from mcpo_kernels.integrations import transformers as integration
from mcpo_kernels.integrations.packable import probe, use_packed_attention

FAMILIES = (
    "llama",
    "mistral",
    "gemma",
    "gemma2",
    "gemma3_text",
    "qwen2",
    "qwen3",
    "smollm3",
    "olmo2",
    "olmo3",
    "phi3",
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "gpt_oss",
    "glm4",
    "granite",
    "deepseek_v3",
)
# Some thousand roundings of float64, as for the derived band; one of float32 is 6e-8.
MOST_GRADIENT_ERROR = 1e-10


@pytest.fixture(autouse=True)
def quiet():
    """Models say what they miss, on the CPU."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_served_exactly_values_and_gradients(model_type: str) -> None:
    verdict = examine(model_type)
    assert verdict.outcome == "served", verdict
    assert verdict.float32_error is not None
    assert verdict.float32_error <= 1
    assert verdict.float64_error is not None
    assert verdict.gradient_error is not None
    # |log-probs| are below 1000 here.
    assert verdict.float64_error <= float(
        compare.band(torch.full((len(compare.CANDIDATES),), 1000.0), torch.float64).max()
    )
    assert verdict.gradient_error <= MOST_GRADIENT_ERROR


@pytest.mark.parametrize(
    ("model_type", "outcome", "stage", "reason"),
    [
        ("qwen3_next", "plain", "declared", "layers of the kind linear_attention"),
        ("nemotron_h", "plain", "declared", "linear_attention"),
        ("lfm2", "plain", "declared", "layers of the kind conv"),
        ("falcon_h1", "plain", "declared", "layers of the kind hybrid"),
        ("llama4_text", "plain", "declared", "layers of the kind chunked_attention"),
        ("bloom", "plain", "declared", "stayed 'eager'"),
        ("xlstm", "plain", "probe", "2 layers and 0 of them attend"),
        ("doge", "plain", "probe", "on a packed row it raises"),
        ("bert", "refused", "head", "more than a projection of its hidden states"),
    ],
)
def test_named_by_a_check_before_anything_is_trained(
    model_type: str, outcome: str, stage: str, reason: str
) -> None:
    verdict = examine(model_type)
    assert (verdict.outcome, verdict.stage) == (outcome, stage)
    assert reason in verdict.reason


def test_a_window_that_is_not_kept_to_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = integration.prefix_attention
    monkeypatch.setattr(
        integration,
        "prefix_attention",
        lambda *tensors, **rule: kept(*tensors, **rule | {"window": None}),
    )
    verdict = examine("mistral")
    assert (verdict.outcome, verdict.stage) == ("plain", "self-check")


def test_a_layer_without_attention_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kind is declared, so that the declaration has to be taken away to get there."""
    monkeypatch.setattr(
        "mcpo_kernels.integrations.packable.SERVED_LAYER_TYPES",
        frozenset({"linear_attention", "full_attention"}),
    )
    model = compare.build("qwen3_next")
    monkeypatch.setattr("torch.nn.Conv1d", torch.nn.Bilinear)
    use_packed_attention(model)
    with pytest.raises(integration.UnpackableError, match="2 layers and 1 of them attend"):
        probe(model)


def test_small_models_have_one_layer_of_each_kind_and_short_windows() -> None:
    config = small_config("gemma3_text")
    assert sorted(config.layer_types) == ["full_attention", "sliding_attention"]
    assert config.sliding_window == SPAN < compare.PROMPT


def test_float64_throughout_leaves_no_float32_behind() -> None:
    one = torch.ones(2, dtype=torch.float64) / 3
    with float64_throughout():
        assert one.float().dtype == torch.float64
        assert one.to(torch.float32).dtype == torch.float64
        assert torch.softmax(one, 0, dtype=torch.float32).dtype == torch.float64
    assert one.float().dtype == torch.float32


def test_what_takes_too_long_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def endless(_: str) -> Verdict:
        while True:
            pass

    monkeypatch.setattr("benchmarks.models.__main__.examine", endless)
    verdict = within(1, "llama")
    assert (verdict.outcome, verdict.reason) == ("not built", "it took more than 1 s")


def test_the_page_is_what_the_rows_say() -> None:
    assert PAGE.read_text() == page(read(RESULTS))


def test_the_rows_know_every_model_type_and_none_is_unexplained() -> None:
    verdicts = [row.verdict for row in read(RESULTS)]
    assert {verdict.model_type for verdict in verdicts} == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert sum(verdict.outcome == "served" for verdict in verdicts) >= 75
    for verdict in verdicts:
        assert verdict.outcome in ("served", "plain", "refused", "not built")
        if verdict.outcome != "served":
            assert verdict.reason, verdict
        else:
            assert verdict.float32_error is not None
            assert verdict.float32_error <= 1


@pytest.mark.slow
@pytest.mark.parametrize("row", read(RESULTS), ids=lambda row: row.verdict.model_type)
def test_every_row_holds(row) -> None:
    verdict = within(180, row.verdict.model_type)
    assert (verdict.outcome, verdict.stage) == (row.verdict.outcome, row.verdict.stage)
    if verdict.gradient_error is not None:
        assert verdict.gradient_error <= MOST_GRADIENT_ERROR
