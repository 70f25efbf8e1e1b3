"""What torchrun's variables say, which engine runs; what they do: test_engine_ranks.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, build_model, words

from mcpo.cli import launch_file, make_config, parse_args, read_yaml
from mcpo.config import ScaleConfig
from mcpo.engine import (
    choose,
    launched_by_torchrun,
    local_rank,
    local_world_size,
    lockstep,
    rank,
    sharded_files,
    whole,
    world_size,
)
from mcpo.engine.choose import bytes_per_parameter, check_combination, engine_name
from mcpo.engine.single import SingleEngine
from mcpo.optimizer import build_optimizer
from mcpo.policy import Policy
from mcpo.train import main

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@pytest.mark.parametrize(
    ("given", "launched", "numbers"),
    [
        ({}, False, (0, 1, 0, 1)),
        (dict(zip(NAMES, ("5", "8", "1", "4"), strict=True)), True, (5, 8, 1, 4)),
        # Some batch systems set one of them for jobs of one process.
        ({"RANK": "3"}, False, (0, 1, 0, 1)),
    ],
    ids=["none", "torchrun", "rank-alone"],
)
def test_the_place_in_a_group_is_what_torchrun_says(
    monkeypatch: pytest.MonkeyPatch,
    given: dict[str, str],
    launched: bool,
    numbers: tuple[int, int, int, int],
) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert launched_by_torchrun() == launched
    assert (rank(), world_size(), local_rank(), local_world_size()) == numbers


def launch(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    for name, value in zip(NAMES, ("0", str(size), "0", str(size)), strict=True):
        monkeypatch.setenv(name, value)


def test_auto_is_ddp_under_a_launcher_and_single_without(monkeypatch: pytest.MonkeyPatch) -> None:
    assert engine_name(ScaleConfig()) == "single"
    launch(monkeypatch, 2)
    assert engine_name(ScaleConfig()) == "ddp"
    assert engine_name(ScaleConfig(engine="fsdp2")) == "fsdp2"


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "deepspeed"])
def test_an_engine_of_several_processes_needs_a_launcher(
    arguments: dict[str, Any], capsys: pytest.CaptureFixture[str], engine: str
) -> None:
    assert main(words(arguments | {"engine": engine})) == 2
    assert f"engine: {engine} needs the processes of a launcher" in capsys.readouterr().err


def test_single_refuses_company(monkeypatch: pytest.MonkeyPatch) -> None:
    launch(monkeypatch, 2)
    with pytest.raises(ValueError, match="engine: single runs in one process, got 2 of them"):
        engine_name(ScaleConfig(engine="single"))


def test_deepspeed_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    launch(monkeypatch, 2)
    monkeypatch.setattr(choose.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'mcpo\[deepspeed\]'"):
        engine_name(ScaleConfig(engine="deepspeed"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--engine", "horovod"], "engine must be one of auto, single, ddp, fsdp2, deepspeed, got"),
        (["--zero_stage", "4"], "zero_stage must be 1, 2 or 3, got 4"),
        (["--whole_gradients"], "whole_gradients is an option of engine: fsdp2"),
        (["--engine", "fsdp2", "--offload"], "offload is an option of engine: deepspeed"),
    ],
    ids=["unknown", "stage", "whole-gradients", "offload"],
)
def test_options_of_engines_are_checked(options: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_args(options)


def test_a_preset_goes_before_the_file_and_the_file_before_the_command_line(
    tmp_path: Path,
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("zero_stage: 2\nseed: 3\n")
    scale = parse_args(["--launch", "zero3_offload"]).scale
    assert (scale.engine, scale.zero_stage, scale.offload) == ("deepspeed", 3, True)
    config = parse_args(["--launch", "zero3", "--config", str(file), "--seed", "4"])
    assert (config.scale.engine, config.scale.zero_stage, config.run.seed) == ("deepspeed", 2, 4)


def test_a_preset_that_is_not_there_is_named() -> None:
    with pytest.raises(FileNotFoundError, match=r"--launch must name one of ddp, fsdp2, .*'zero9'"):
        parse_args(["--launch", "zero9"])


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "launch").glob("*.yaml")), ids=str)
def test_presets_hold_engines_alone_and_name_themselves(path: Path) -> None:
    options = read_yaml(launch_file(path.stem))
    assert set(options) <= {"engine", "zero_stage", "offload"}
    assert f"--launch {path.stem} " in path.read_text()


@pytest.mark.parametrize(
    ("options", "name", "expected"),
    [
        ({}, "single", 16),
        ({}, "ddp", 16),
        ({"engine": "fsdp2"}, "fsdp2", 4),
        ({"engine": "fsdp2", "whole_gradients": True}, "fsdp2", 1 + 4 + 2),
        ({"engine": "deepspeed", "zero_stage": 1}, "deepspeed", 4 + 4 + 2),
        ({"engine": "deepspeed", "zero_stage": 2}, "deepspeed", 4 + 1 + 2),
        ({"engine": "deepspeed", "zero_stage": 3}, "deepspeed", 4),
        ({"engine": "deepspeed", "zero_stage": 3, "offload": True}, "deepspeed", 1),
    ],
    ids=lambda value: str(value),
)
def test_state_of_a_parameter_on_each_of_four_processes(
    options: dict[str, Any], name: str, expected: float
) -> None:
    assert bytes_per_parameter(ScaleConfig(**options), name, 4) == expected


class TwoRanks(SingleEngine):
    """The other one makes a plain forward whenever this one makes any."""

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        return values + torch.tensor([0, 1]) if values.sum() else values


def test_forwards_of_two_kinds_at_once_are_refused() -> None:
    policy = Policy(build_model(), head_impl="auto", autocast_dtype=None)
    engine = TwoRanks(policy, None, torch.device("cpu"))  # type: ignore[arg-type]
    with (
        pytest.raises(RuntimeError, match="packed forwards or all of them plain ones, got 1 and 1"),
        lockstep.run_along(engine, lambda: None),
    ):
        policy(None)


def test_a_model_without_layers_is_not_sharded(monkeypatch: pytest.MonkeyPatch) -> None:
    from mcpo.engine import sharding

    monkeypatch.setattr(sharding, "GradientCheckpointingLayer", torch.nn.Bilinear)
    policy = Policy(build_model(), head_impl="auto", autocast_dtype=None)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM must be .* to be sharded one by one"):
        sharding.shard(policy, torch.device("cpu"))


def test_files_of_the_other_kind_are_named(tmp_path: Path) -> None:
    policy = Policy(build_model(), head_impl="auto", autocast_dtype=None)
    config = parse_args([]).optim
    optimizer = build_optimizer(policy, config)
    with pytest.raises(ValueError, match=r"must hold whole weights and optimizer\.pt"):
        whole.load(tmp_path, policy.model, optimizer)
    with pytest.raises(ValueError, match="must hold shards/, and an engine with whole weights"):
        sharded_files.load(tmp_path, policy.model, optimizer)


@pytest.mark.parametrize("name", choose.SHARDING)
def test_a_sharding_engine_trains_every_weight(name: str) -> None:
    policy = Policy(build_model(), head_impl="auto", autocast_dtype=None)
    policy.model.get_input_embeddings().requires_grad_(False)
    with pytest.raises(ValueError, match=f"engine: {name} trains every weight, and 1 are frozen"):
        choose.make_engine(name, policy, parse_args([]), torch.device("cpu"))


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"use_peft": True}, "adapters"),
        ({"reference": "live"}, "a live reference"),
        ({"sync_ref_model": True}, "a live reference"),
    ],
)
@pytest.mark.parametrize("name", choose.SHARDING)
def test_what_sharded_weights_do_not_have_is_refused(
    options: dict[str, Any], what: str, name: str
) -> None:
    config = make_config(options)
    check_combination(config, "ddp")
    with pytest.raises(ValueError, match=f"engine: {name} needs all weights trained.*got {what}"):
        check_combination(config, name)
