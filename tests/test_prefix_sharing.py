from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_model, build_tokenizer, words
from rich.console import Console
from test_step import GROUPS
from transformers import (
    BertConfig,
    BertLMHeadModel,
    BloomConfig,
    BloomForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from mcpo.cli import make_config
from mcpo.config import Config
from mcpo.engine.single import SingleEngine
from mcpo.metrics import read_metrics
from mcpo.optimizer import build_optimizer
from mcpo.pack import pack
from mcpo.placement import Placement
from mcpo.plain_rows import PADDED_SHARE, plain_hidden, similar_lengths
from mcpo.policy import Policy, disable_dropout, group_logps
from mcpo.prefix_sharing import MOST_MADE_UP_TOKENS, made_up_group, make_policy, settle
from mcpo.reference_cache import ReferenceLogps
from mcpo.self_check import FLOAT32_UNITS
from mcpo.step import StepWork, train_step
from mcpo.train import main

CPU = Placement(device=torch.device("cpu"), autocast_dtype=None, reason="")
SIZES = {"vocab_size": 97, "hidden_size": 32, "initializer_range": 0.2}


def qwen3_next() -> PreTrainedModel:
    return Qwen3NextForCausalLM(
        Qwen3NextConfig(
            **SIZES,
            intermediate_size=48,
            num_hidden_layers=2,
            layer_types=["linear_attention", "full_attention"],
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            linear_num_key_heads=2,
            linear_num_value_heads=2,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
        )
    )


def bloom() -> PreTrainedModel:
    return BloomForCausalLM(BloomConfig(**SIZES, n_layer=2, n_head=4))


def mamba() -> PreTrainedModel:
    return MambaForCausalLM(MambaConfig(**SIZES, num_hidden_layers=2, state_size=8))


UNPACKABLE = {"qwen3_next": qwen3_next, "bloom": bloom, "mamba": mamba}


def config_of(**options: object) -> Config:
    return make_config(
        {
            # AdamW made linear: gradient descent at the rate 1e-2, which does not make a full step
            # of the rounding of a gradient near 0.
            "learning_rate": 1e4,
            "adam_beta1": 0.0,
            "adam_epsilon": 1e6,
            "max_grad_norm": 1e9,
            "warmup_ratio": 0.0,
            "num_negatives": 4,
            "beta": 0.5,
            **options,
        }
    )


def settled(model: PreTrainedModel, config: Config) -> tuple[SingleEngine, Config, str]:
    """What a run does before its reference pass, and what it prints."""
    console = Console(record=True, width=1000)
    policy, reason = make_policy(model, config, CPU)
    engine = SingleEngine(policy, build_optimizer(policy, config.optim), torch.device("cpu"))
    config, _ = settle(engine, GROUPS, config, console, reason)
    return engine, config, console.export_text()


def naive_losses(model: PreTrainedModel, num_steps: int, config: Config) -> list[float]:
    """A loop as anybody would write it: all negatives of every pool, one forward a candidate."""
    disable_dropout(model)
    policy = Policy(model, head_impl="reference", autocast_dtype=None, packs=False)
    optimizer = build_optimizer(policy, config.optim)

    def logps() -> list[torch.Tensor]:
        return [
            torch.stack(
                [
                    model(input_ids=torch.tensor([[*group.prompt_ids, *ids]]), use_cache=False)
                    .logits[0, len(group.prompt_ids) - 1 : -1]
                    .log_softmax(-1)
                    .gather(1, torch.tensor(ids)[:, None])
                    .sum()
                    for ids in group.candidate_ids
                ]
            )
            for group in GROUPS
        ]

    references = [logp_C.detach() for logp_C in logps()]
    losses = []
    for _ in range(num_steps):
        ratios = [now - then for now, then in zip(logps(), references, strict=True)]
        loss = -sum((config.loss.beta * ratio).log_softmax(0)[0] for ratio in ratios) / len(GROUPS)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("build", UNPACKABLE.values(), ids=UNPACKABLE)
def test_a_model_that_cannot_be_packed_trains_as_a_naive_loop_does(build) -> None:
    torch.manual_seed(0)
    model = build().train()
    config = config_of()
    wanted = naive_losses(copy.deepcopy(model), 3, config)

    engine, config, _ = settled(model, config)
    assert config.model.prefix_sharing == "off"
    assert not engine.policy.packs
    batch = pack(GROUPS, share_prefix=False)
    with torch.no_grad():
        logp_PC = group_logps(engine.policy(batch), batch)
    references = ReferenceLogps(
        logps={
            group.row_id: tuple(row[: group.num_candidates])
            for group, row in zip(GROUPS, logp_PC.tolist(), strict=True)
        }
    )
    work = StepWork(step=0, batches=(batch,), num_prompts=len(GROUPS))
    losses = [train_step(engine, work, references, config)["loss"] for _ in range(3)]
    assert wanted[2] < 0.9 * wanted[0]
    # A loss moves by beta times what a log-ratio does, each of two log-probs of up to 100 nats.
    band = FLOAT32_UNITS * torch.finfo(torch.float32).eps * config.loss.beta * 2 * 100
    assert max(float(logp) for logp in -logp_PC.flatten()) < 100
    assert losses == pytest.approx(wanted, rel=0, abs=band)


@pytest.mark.parametrize("build", UNPACKABLE.values(), ids=UNPACKABLE)
def test_auto_says_why_it_does_not_pack_and_on_refuses_with_the_reason(build) -> None:
    model = build()
    reason = "layers of the kind linear_attention|AttentionInterface, and stayed"
    with pytest.raises(ValueError, match=f"prefix_sharing: on needs .*({reason}).*With auto it"):
        settled(model, config_of(prefix_sharing="on"))
    _, _, text = settled(model, config_of())
    assert text.startswith("prefix_sharing: auto: one sequence per row")
    assert type(model).__name__ in text
    assert text.count("\n") == 1


def test_a_whole_run_of_a_model_that_cannot_be_packed(
    arguments: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bloom().save_pretrained(tmp_path / "bloom")
    build_tokenizer().save_pretrained(tmp_path / "bloom")
    options = arguments | {"model_name_or_path": tmp_path / "bloom", "max_steps": 2}
    assert main(words(options)) == 0
    assert "prefix_sharing: auto: one sequence per row" in capsys.readouterr().out
    lines = read_metrics(arguments["output_dir"] / "metrics.jsonl")
    assert len(lines) == 2
    assert main(words(options | {"prefix_sharing": "on", "output_dir": tmp_path / "on"})) == 2
    assert "prefix_sharing: on needs a model that can be packed" in capsys.readouterr().err


def test_an_attention_that_cannot_run_here_is_refused_at_once(
    arguments: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(arguments | {"attention_impl": "flash"})) == 2
    assert "attention_impl: impl='flash' cannot run here" in capsys.readouterr().err
    assert main(words(arguments | {"attention_impl": "fast"})) == 2
    assert "attention_impl: impl must be one of" in capsys.readouterr().err


def mixes_tokens(model: PreTrainedModel) -> PreTrainedModel:
    """Nothing that the model declares or the probe counts says so: a state beside attention."""
    layer = model.model.layers[0]
    layer.register_forward_hook(
        lambda _, __, output: output + torch.nn.functional.pad(output, (0, 0, 1, 0))[:, :-1]
    )
    return model


@pytest.mark.parametrize("self_check", [True, False])
def test_what_nothing_declares_is_measured(self_check: bool) -> None:
    config = config_of(self_check=self_check)
    engine, outcome, text = settled(mixes_tokens(build_model()), config)
    assert "must give the same log-probabilities packed and alone" in text
    assert not engine.policy.packs
    assert outcome.model.prefix_sharing == "off"
    assert engine.policy.model.config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match="prefix_sharing: on needs a model that can be packed"):
        settled(mixes_tokens(build_model()), config_of(self_check=self_check, prefix_sharing="on"))


def settled_beside(*answers: str | None) -> tuple[Config, str]:
    """Settle next to a rank whose packed and plain checks come out as ``answers``."""
    config = config_of()
    policy, _ = make_policy(build_model(), config, CPU)
    engine = SingleEngine(policy, build_optimizer(policy, config.optim), torch.device("cpu"))
    there = iter(answers)
    engine.gather = lambda reason: [reason, next(there)]  # pyright: ignore
    console = Console(record=True, width=1000)
    outcome, _ = settle(engine, GROUPS, config, console, None)
    return outcome, console.export_text()


def test_any_rank_that_cannot_pack_takes_the_others_along() -> None:
    outcome, text = settled_beside("of another rank", None)
    assert outcome.model.prefix_sharing == "off"
    assert "because of another rank" in text


def test_a_plain_check_that_fails_on_another_rank_stops_this_one() -> None:
    with pytest.raises(ValueError, match="plain rows are wrong there"):
        settled_beside("of another rank", "plain rows are wrong there")


@pytest.mark.parametrize(("asked", "shares"), [("auto", True), ("on", True), ("off", False)])
def test_a_llama_is_packed_as_asked(asked: str, shares: bool) -> None:
    engine, config, text = settled(build_model(), config_of(prefix_sharing=asked))
    assert engine.policy.packs
    assert config.model.prefix_sharing == asked
    assert config.model.shares_prefixes is shares
    assert ("prompts shared" in text) is shares


@pytest.mark.parametrize("value", [True, "true", "True", "on"], ids=repr)
def test_what_was_a_switch_may_still_be_one(value: object) -> None:
    assert config_of(prefix_sharing=value).model.prefix_sharing == "on"
    with pytest.raises(ValueError, match="prefix_sharing must be one of auto, on, off, got 'yes'"):
        config_of(prefix_sharing="yes")
    assert config_of(prefix_sharing=False).model.prefix_sharing == "off"


def test_a_head_that_does_more_is_refused_either_way() -> None:
    """Bert transforms its hidden states before it projects them."""
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    model = BertLMHeadModel(BertConfig(**SIZES, **sizes, is_decoder=True)).eval()
    with pytest.raises(ValueError, match="more than a projection of its hidden states, or padding"):
        settled(model, config_of())


def test_the_made_up_group_is_longer_than_the_windows() -> None:
    model = build_model()
    policy = Policy(model, head_impl="auto", autocast_dtype=None)
    assert len(made_up_group(policy).prompt_ids) < 20
    model.config.sliding_window = 40
    assert len(made_up_group(policy).prompt_ids) > 40
    model.config.sliding_window = 100_000
    assert len(made_up_group(policy).prompt_ids) < MOST_MADE_UP_TOKENS + 20


def test_similar_lengths_share_a_forward_and_little_is_padding() -> None:
    lengths = [7, 0, 100, 90, 8, 99, 1, 50]
    forwards = similar_lengths(lengths)
    assert sorted(index for members in forwards for index in members) == [0, 2, 3, 4, 5, 6, 7]
    assert [2, 5, 3, 7] in forwards
    for members in forwards:
        padded = lengths[members[0]] * len(members)
        assert PADDED_SHARE * (padded - sum(lengths[member] for member in members)) <= padded
    assert similar_lengths([5] * 4) == [[0, 1, 2, 3]]


def test_plain_forwards_take_no_shared_prefix() -> None:
    batch = pack(GROUPS, share_prefix=True)
    with pytest.raises(ValueError, match=r"sequences that stand alone.*share_prefix=False"):
        plain_hidden(torch.nn.Identity(), batch.token_T, batch.layout)


@pytest.mark.parametrize("reason", ["it has layers of the kind linear_attention", None])
def test_ranks_that_must_go_together_need_a_model_that_packs(reason: str | None) -> None:
    """Known from its declaration, or found out by the check."""
    policy = Policy(build_model(), head_impl="auto", autocast_dtype=None)
    config = config_of()
    engine = SingleEngine(policy, build_optimizer(policy, config.optim), CPU.device)
    engine.lockstep = True
    if reason is None:
        # Logits that are more than a projection of hidden states.
        def double(model: object, inputs: object, output: Any) -> None:
            output.logits.mul_(2.0)

        policy.model.register_forward_hook(double)
    with pytest.raises(ValueError, match=r"engine that shards weights needs .* use engine: ddp"):
        settle(engine, GROUPS, config, Console(quiet=True), reason)
    assert policy.packs
