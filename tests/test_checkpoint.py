from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import build_model, build_tokenizer
from safetensors.torch import load_file, save_file
from transformers import MixtralConfig, MixtralForCausalLM

from mcpo import checkpoint
from mcpo.checkpoint import TrainState
from mcpo.config import OptimConfig
from mcpo.engine.single import SingleEngine
from mcpo.engine.whole import load_weights
from mcpo.optimizer import build_optimizer
from mcpo.policy import Policy


def state(step: int) -> TrainState:
    return TrainState(step=step, wall_s=1.5, num_tokens=10.0, identity={"seed": 0})


def engine_of(seed: int = 0) -> SingleEngine:
    """With a moment, so that the optimizer has something to say."""
    policy = Policy(build_model(seed), head_impl="auto", autocast_dtype=None)
    optimizer = build_optimizer(policy, OptimConfig())
    for weight in policy.parameters():
        weight.grad = torch.full_like(weight, 1.0 + seed)
    optimizer.step()
    policy.model.load_state_dict(build_model(seed).state_dict())
    return SingleEngine(policy, optimizer, torch.device("cpu"))


def save(folder: Path, step: int, keep: int = 2) -> Path:
    return checkpoint.save(
        engine_of(),
        folder,
        state(step),
        tokenizer=build_tokenizer(),
        training={"schedule": {"step": torch.tensor(step)}},
        keep=keep,
    )


def test_state_weights_and_optimizer_come_back(tmp_path: Path) -> None:
    folder = save(tmp_path, 3)
    assert checkpoint.newest(tmp_path) == folder
    assert checkpoint.read_state(folder) == state(3)
    assert checkpoint.load_training(folder)["schedule"]["step"] == 3
    other = engine_of(seed=1)
    other.load(folder)
    for (name, left), right in zip(
        other.policy.model.state_dict().items(), build_model().state_dict().values(), strict=True
    ):
        assert torch.equal(left, right), name
    moments, expected = (each.optimizer.state_dict()["state"] for each in (other, engine_of()))
    for number, values in expected.items():
        assert all(torch.equal(moments[number][name], value) for name, value in values.items())


def test_renamed_and_sharded_weights_come_back(tmp_path: Path) -> None:
    """transformers saves the experts of a Mixtral under other names than it computes with."""
    config = MixtralConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    saved, other = MixtralForCausalLM(config), MixtralForCausalLM(config)
    saved.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("model*.safetensors"))) > 1
    load_weights(tmp_path, other)
    for (name, left), right in zip(
        other.state_dict().items(), saved.state_dict().values(), strict=True
    ):
        assert torch.equal(left, right), name


@pytest.mark.parametrize("damage", ["missing", "unexpected"])
def test_weights_that_are_not_those_of_the_model_are_refused(tmp_path: Path, damage: str) -> None:
    folder = save(tmp_path, 1)
    path = folder / "model.safetensors"
    stored = load_file(path)
    norm = stored.pop("model.norm.weight")
    if damage == "unexpected":
        stored |= {"model.norm.weight": norm, "model.extra.weight": norm.clone()}
    save_file(stored, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"every weight of LlamaForCausalLM .*{damage}_keys"):
        load_weights(folder, build_model())


def test_a_state_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    (folder / "state.json").write_text("{broken")
    with pytest.raises(ValueError, match=r"checkpoint-1 must be a whole checkpoint .*delete that"):
        checkpoint.read_state(folder)


def test_any_loader_reads_the_model(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = save(tmp_path, 1)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(loaded.lm_head.weight, build_model().lm_head.weight)
    assert AutoTokenizer.from_pretrained(folder).eos_token == "<|im_end|>"


def test_only_the_newest_are_kept_by_number_not_by_name(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        save(tmp_path, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-100"]
    assert checkpoint.newest(tmp_path) == tmp_path / "checkpoint-100"


def test_an_unfinished_checkpoint_is_never_picked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)

    def die(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", die)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 2)
    assert checkpoint.newest(tmp_path) == tmp_path / "checkpoint-1"
    monkeypatch.undo()
    assert save(tmp_path, 2) == checkpoint.newest(tmp_path)


def test_no_checkpoint_in_an_empty_or_absent_folder(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path) is None
    assert checkpoint.newest(tmp_path / "absent") is None
