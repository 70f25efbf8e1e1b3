"""LoRA: gradients of the plain computation, what trains, what is saved, what is refused."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_model, words
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_recompute import BATCH, assert_same, gradients, naive_loss, recomputed_loss
from test_step import GROUPS, references_of
from tiny_models import float64_model
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from mcpo.adapters import (
    POLICY,
    attach,
    base_weights,
    merged_model,
    merged_weights,
    read,
    save,
    without_adapters,
)
from mcpo.cli import make_config
from mcpo.config import AdapterConfig
from mcpo.engine.single import SingleEngine
from mcpo.metrics import read_metrics
from mcpo.optimizer import build_optimizer
from mcpo.pack import pack
from mcpo.policy import Policy
from mcpo.step import StepWork, train_step
from mcpo.train import main

# Every linear layer of the body, and the head.
EVERYWHERE = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
    "lm_head",
)
LORA = {"use_peft": "true", "lora_r": 4, "lora_alpha": 12}


# Under this version of transformers every PeftModel warns.
PEFT_WARNS = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is:FutureWarning")


def adapted(model: torch.nn.Module, *targets: str, seed: int = 0) -> Any:
    """Adapters that add something: a fresh one begins at zero."""
    config = AdapterConfig(use_peft=True, lora_r=3, lora_target_modules=targets or EVERYWHERE)
    attach(model, config, seed=seed, keep_reference=False)  # pyright: ignore
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, tensor in read(model).items():  # pyright: ignore
            if "lora_B" in name:
                tensor.normal_(std=0.3)
    return model


@pytest.mark.usefixtures("exact_softmax")
@pytest.mark.parametrize("targets", [EVERYWHERE, ("all-linear",)], ids=["head-too", "body"])
def test_every_mode_has_the_gradients_of_the_padded_group(targets: tuple[str, ...]) -> None:
    model = adapted(float64_model("llama"), *targets)
    policy = Policy(model, head_impl="auto", autocast_dtype=None, recompute="selective").train()
    padded = naive_loss(policy)
    expected = gradients(policy, padded)
    assert len(expected) == len(read(model))
    assert all(".lora_" in name for name in expected)
    for mode in ("none", "light", "selective", "full"):
        ours = recomputed_loss(policy, mode)
        torch.testing.assert_close(ours, padded, rtol=1e-12, atol=0)
        assert_same(gradients(policy, ours), expected)


@pytest.mark.usefixtures("exact_softmax")
@pytest.mark.parametrize("targets", [EVERYWHERE, ("lm_head",)], ids=["everywhere", "head"])
def test_the_merged_model_scores_the_same(targets: tuple[str, ...]) -> None:
    model = float64_model("llama")
    # Else the head's weight is the embedding's.
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    model.all_tied_weights_keys = {}
    policy = Policy(adapted(model, *targets), head_impl="auto", autocast_dtype=None)
    plain = float64_model("llama")
    plain.lm_head.weight = torch.nn.Parameter(plain.lm_head.weight.clone())
    with without_adapters(model):
        bare_S = policy(BATCH)
    plain.load_state_dict(merged_weights(model))
    merged = Policy(plain, head_impl="auto", autocast_dtype=None)
    # A weight of the merged model is one float64 rounding off, in sums of a hundred of them.
    torch.testing.assert_close(policy(BATCH), merged(BATCH), rtol=1e-12, atol=1e-12)
    assert (policy(BATCH) - bare_S).abs().min() > 1e-3


def test_in_bf16_the_head_is_as_near_as_the_plain_computation() -> None:
    model = build_model(tied=False)
    policy = Policy(adapted(model, "lm_head"), head_impl="auto", autocast_dtype=torch.bfloat16)
    head: Any = model.lm_head
    torch.manual_seed(1)
    hidden_ND = torch.randn(len(BATCH.scored_N), 32).bfloat16()
    down, up = head.lora_A[POLICY].weight, head.lora_B[POLICY].weight
    scale = head.scaling[POLICY]

    def naive(dtype: torch.dtype) -> torch.Tensor:
        hidden = hidden_ND.to(dtype)
        low = scale * F.linear(hidden, down.to(dtype))
        logit_NV = F.linear(hidden, head.weight.to(dtype)) + F.linear(low, up.to(dtype))
        logp_N = logit_NV.to(torch.promote_types(dtype, torch.float32)).log_softmax(-1)
        target_N1 = BATCH.target_N[:, None]
        total_S = torch.zeros(BATCH.num_seqs, dtype=logp_N.dtype)
        return total_S.index_add(0, BATCH.seq_of_N, logp_N.gather(1, target_N1)[:, 0])

    with torch.no_grad():
        exact_S, naive_S = naive(torch.float64), naive(torch.bfloat16)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ours_S = head(hidden_ND, BATCH)
    assert policy.model.lm_head is head
    # The budget of the kernels: twice the error of the naive computation in the same dtype.
    assert (ours_S - exact_S).abs().max() <= 2 * (naive_S - exact_S).abs().max()
    bare_S = head.base_layer(hidden_ND, BATCH)
    assert (bare_S - exact_S).abs().max() > 10 * (naive_S - exact_S).abs().max()


def test_only_adapters_train() -> None:
    model = adapted(build_model())
    config = make_config({"learning_rate": 1e-2, "num_negatives": 2})
    policy = Policy(model, head_impl="auto", autocast_dtype=None, recompute="light").train()
    engine = SingleEngine(policy, build_optimizer(policy, config.optim), torch.device("cpu"))
    base = {name: tensor.clone() for name, tensor in base_weights(model).items()}
    before = {name: tensor.clone() for name, tensor in read(model).items()}
    batch = pack(GROUPS, share_prefix=True)
    references = references_of(engine)
    losses = [
        train_step(
            engine,
            StepWork(step=step, batches=(batch,), num_prompts=len(GROUPS)),
            references,
            config,
        )["loss"]
        for step in range(3)
    ]
    assert losses[-1] < losses[0]
    assert base.keys() == build_model().state_dict().keys()
    assert all(torch.equal(base[name], tensor) for name, tensor in base_weights(model).items())
    assert all(not torch.equal(before[name], tensor) for name, tensor in read(model).items())


def test_plain_forwards_train_adapters_too() -> None:
    """One sequence per row, with transformers' own checkpointing over frozen embeddings."""
    batch = pack(GROUPS, share_prefix=False)

    def found(recompute: str) -> list[torch.Tensor]:
        model = adapted(build_model())
        policy = Policy(
            model, head_impl="auto", autocast_dtype=None, recompute=recompute, packs=False
        ).train()
        policy(batch).sum().backward()
        return [weight.grad for weight in policy.parameters() if weight.grad is not None]

    plain, recomputed = found("none"), found("full")
    assert len(plain) == len(read(adapted(build_model())))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(plain, recomputed, strict=True))


@PEFT_WARNS
def test_a_run_saves_adapters_that_score_alike_everywhere(
    arguments: dict[str, Any], tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also the rest of a run: the reference that a run without adapters left, and a resume."""
    main(words(arguments | {"max_steps": 1, "output_dir": tmp_path / "whole"}))
    settings = arguments | LORA | {"merge_adapter": "true", "save_steps": 3, "save_total_limit": 9}
    capsys.readouterr()
    assert main(words(settings)) == 0
    shown = capsys.readouterr().out
    assert "reference log-probs: found in" in shown
    assert "adapter saved in" in shown
    output_dir = arguments["output_dir"]
    lines = read_metrics(output_dir / "metrics.jsonl")
    assert lines[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert not (output_dir / "checkpoint-3" / "model.safetensors").exists()

    tokens = torch.tensor([[2, 10, 11, 12, 20]])
    base = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    untrained = base(tokens).logits
    by_peft = PeftModel.from_pretrained(base, output_dir / "model")
    by_transformers = AutoModelForCausalLM.from_pretrained(
        output_dir / "model", dtype=torch.float32
    )
    merged = AutoModelForCausalLM.from_pretrained(output_dir / "merged", dtype=torch.float32)
    expected = merged(tokens).logits
    for model in (by_peft, by_transformers):
        torch.testing.assert_close(model(tokens).logits, expected)
    assert (untrained - expected).abs().max() > 1e-2

    resumed = tmp_path / "resumed"
    shutil.copytree(output_dir / "checkpoint-3", resumed / "checkpoint-3")
    assert main([*words(settings | {"output_dir": resumed}), "--resume"]) == 0
    first, second = (
        load_file(folder / "model" / "adapter_model.safetensors")
        for folder in (output_dir, resumed)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first.keys() == second.keys()
    assert main([*words(settings | {"lora_alpha": 16, "output_dir": resumed}), "--resume"]) == 2
    assert "lora_alpha (12 then, 16 now)" in capsys.readouterr().err


def test_a_run_goes_on_from_an_adapter(arguments: dict[str, Any], tmp_path: Path) -> None:
    """In bf16, head included; its reference has the adapter on, so it is no other run's."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    save(adapted(build_model()), folder)
    main(words(arguments | {"max_steps": 1, "bf16": "true"}))
    more = {"adapter_name_or_path": folder, "output_dir": tmp_path / "more", "bf16": "true"}
    assert main(words(arguments | more | {"recompute": "selective", "max_steps": 3})) == 0
    assert len(list(arguments["reference_cache_dir"].iterdir())) == 2
    lines = read_metrics(tmp_path / "more" / "metrics.jsonl")
    assert lines[0]["loss"] == pytest.approx(0.6931, abs=1e-2)
    before, after = (
        load_file(where / "adapter_model.safetensors")
        for where in (folder, tmp_path / "more" / "model")
    )
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)


def test_a_dry_run_counts_what_trains(
    arguments: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main([*words(arguments | LORA), "--dry_run"]) == 0
    lines = [line.split("│") for line in capsys.readouterr().out.splitlines() if "│" in line]
    shown = {line[1].strip(): line[2].strip() for line in lines}
    # Rank times both sides, over seven layers in two blocks: 32 and 32 or 16, and 32 and 64.
    assert shown["of which are trained"] == f"{4 * 2 * (2 * 64 + 2 * 48 + 3 * 96):,}"
    assert shown["reference"] == "precomputed"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_dropout": 0.05}, "lora_dropout must be 0, since the forward that scores is the"),
        ({"lora_r": 0}, "lora_r must be at least 1, got 0"),
        ({"use_peft": "false"}, "options of adapters need use_peft: true or adapter_name_or_path"),
        ({"lora_target_modules": "wq"}, "lora_target_modules must name linear layers of Llama"),
        ({"lora_target_modules": ["q_proj", "v_porj"]}, "got v_porj, which is the name of none"),
        ({"lora_target_modules": ["all-linear", "lm_head"]}, "all-linear stands for every linear"),
        ({"adapter_name_or_path": "x"}, "brings its own rank, scale and targets, so these must"),
        (
            {"lora_target_modules": "lm_head", "merge_adapter": "true"},
            "an adapter on 'lm_head' cannot be merged, because its weight is tied to another",
        ),
        ({"sync_ref_model": "true"}, "ref_model_mixup_alpha must be 1 with use_peft, got 0.6"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_adapters_cannot_do_is_refused(
    arguments: dict[str, Any],
    change: dict[str, Any],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = arguments | LORA | change
    targets = given.pop("lora_target_modules", [])
    listed = ["--lora_target_modules", *([targets] if isinstance(targets, str) else targets)]
    assert main([*words(given), *(listed if targets else [])]) == 2
    assert message in capsys.readouterr().err


def test_without_peft_it_says_what_to_install(
    arguments: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    assert main(words(arguments | LORA)) == 2
    assert "need the package peft, which is not installed; run `pip" in capsys.readouterr().err


@PEFT_WARNS
def test_a_folder_without_a_plain_adapter_is_refused(tmp_path: Path) -> None:
    config = AdapterConfig(adapter_name_or_path=str(tmp_path))
    with pytest.raises(FileNotFoundError, match="which has no adapter_config"):
        attach(build_model(), config, seed=0, keep_reference=False)
    dora = LoraConfig(task_type="CAUSAL_LM", use_dora=True, target_modules=["q_proj"])
    get_peft_model(build_model(), dora).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"must hold plain LoRA, without DoRA.*got .*LORA"):
        attach(build_model(), config, seed=0, keep_reference=False)


def test_an_adapter_of_other_layers_is_refused(tmp_path: Path) -> None:
    save(adapted(build_model(), "q_proj", "v_proj"), tmp_path)
    (tmp_path / "adapter_config.json").write_text(
        (tmp_path / "adapter_config.json").read_text().replace('"v_proj"', '"o_proj"')
    )
    config = AdapterConfig(adapter_name_or_path=str(tmp_path))
    with pytest.raises(ValueError, match="does not fit the model: an adapter must have every"):
        attach(build_model(), config, seed=0, keep_reference=False)


def test_an_adapter_of_another_base_or_a_cut_one_is_refused(tmp_path: Path) -> None:
    save(adapted(build_model(), "q_proj"), tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    narrow = {name: tensor[:2].contiguous() for name, tensor in weights.items()}
    save_file(narrow, tmp_path / "adapter_model.safetensors")
    config = AdapterConfig(adapter_name_or_path=str(tmp_path))
    with pytest.raises(ValueError, match="must have every weight of the model's, in its shape"):
        attach(build_model(), config, seed=0, keep_reference=False)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match="must be a safetensors file, and cannot be read"):
        attach(build_model(), config, seed=0, keep_reference=False)


def test_a_head_that_is_more_than_lora_is_refused() -> None:
    model = build_model(tied=False)
    model.add_adapter(LoraConfig(task_type="CAUSAL_LM", use_dora=True, target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="must be plain LoRA to be scored, got Linear with var"):
        Policy(model, head_impl="auto", autocast_dtype=None)


def test_a_merged_model_keeps_its_ties() -> None:
    model = adapted(build_model(), "all-linear")
    plain = merged_model(model)
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
