from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from mcpo.cli import make_config, option_names, parse_args, parse_args_of, to_flat
from mcpo.config import Config
from mcpo.data.mixture import SourceSpec
from mcpo.online.config import OnlineRun


def test_command_line_overrides_the_file(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("learning_rate: 1e-6\nbeta: 0.2\ntrain_data: [a.jsonl]\nbf16: false\n")
    config = parse_args(["--config", str(path), "--learning_rate", "5e-6"])
    assert config.optim.learning_rate == 5e-6
    assert config.loss.beta == 0.2
    assert config.model.bf16 is False
    assert config.data.train_data == (SourceSpec(path="a.jsonl"),)


def test_values_take_the_type_of_their_field() -> None:
    given = {
        "max_steps": "3",
        "bf16": "true",
        "max_length": "none",
        "dry_run": "false",
    }
    options = [word for name, value in given.items() for word in (f"--{name}", value)]
    config = parse_args([*options, "--replacement", "--train_data", "a.jsonl", "org/set:test"])
    assert config.optim.max_steps == 3
    assert config.kernel.replacement is True
    assert config.model.bf16 is True
    assert config.data.max_length is None
    assert config.run.dry_run is False
    assert config.data.train_data[1] == SourceSpec(path="org/set", split="test")


def test_sources_of_a_mixture_carry_their_own_settings() -> None:
    config = make_config({"train_data": ["a.jsonl", {"path": "b.jsonl", "fraction": 0.5}]})
    assert config.data.train_data[1] == SourceSpec(path="b.jsonl", fraction=0.5)


def test_numbers_of_a_source_may_come_as_words() -> None:
    config = make_config({"train_data": [{"path": "b", "fraction": "5e-1", "max_rows": "3"}]})
    assert config.data.train_data == (SourceSpec(path="b", fraction=0.5, max_rows=3),)


def test_flat_values_make_the_same_config() -> None:
    config = make_config({"learning_rate": "3e-6", "strategy": "max", "train_data": "a.jsonl"})
    flat = to_flat(config)
    assert set(flat) == option_names()
    flat["train_data"] = [dict(source) for source in flat["train_data"]]
    assert make_config(flat) == config


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learning_rat", "1"], "unknown option 'learning_rat' in the command line; did you mean "
         "'learning_rate'"),
        (["--learning_rate", "fast"], "learning_rate must be a number, got 'fast'"),
        (["--max_steps", "2.5"], "max_steps must be a whole number, got '2.5'"),
        (["--bf16", "maybe"], "bf16 must be true or false, got 'maybe'"),
        (["--strategy", "best"], "strategy must be one of mc, max, min, random, got 'best'"),
        (["--beta", "0"], "beta must be positive, got 0.0"),
        (["--temperature", "-1"], "temperature must be positive, got -1.0"),
        (["--num_negatives", "0"], "num_negatives must be at least 1, got 0"),
        (["--max_steps", "0"], "max_steps must be -1 or at least 1, got 0"),
        (["--warmup_ratio", "2"], r"warmup_ratio must be in \[0, 1\], got 2.0"),
        (["--max_length", "1"], "max_length must be at least 2, got 1"),
        (["--max_prompt_length", "0"], "max_prompt_length must be at least 1, got 0"),
        (["--per_device_train_batch_size", "0"], "per_device_train_batch_size must be at least 1"),
        (["--save_total_limit", "0"], "save_total_limit must be at least 1, got 0"),
        (["stray"], "options must be written --name value, got the stray words"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)  # fmt: skip
def test_bad_options_are_named(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_args(arguments)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rte: 1", "unknown option 'learning_rte' in .*did you mean 'learning_rate'"),
        ("- 1", "must hold `name: value` lines, got list"),
        ("a: [1, 2\nb: :", r"recipe\.yaml is not valid YAML: while parsing .* line 2, column 2"),
        ("[" * 20_000, r"recipe\.yaml is not valid YAML: maximum recursion depth"),
        ("seed: '\xff\x01'", r"recipe\.yaml is not valid YAML: .*special characters"),
        ("train_data: [{path: 5}]", "train_data: path must be text, got 5"),
        ("train_data: [{path: x, split: 5}]", "train_data: split must be text, got 5"),
        ("train_data: [{path: x, max_rows: many}]", "train_data: max_rows must be a whole number"),
        ("train_data: [{path: x, fraction: [1]}]", r"train_data: fraction must be a number, got "),
        ("train_data: [{path: x, fraction: null}]", "train_data: fraction must be a number, got N"),
        ("train_data: [{path: x, schema: sft}]", "train_data: schema must be one of auto, "),
        ("train_data: [5]", "train_data must hold file or dataset names, or mappings .* got 5"),
        ("train_data: [{file: x}]", "train_data must hold file or dataset names, or mappings"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        parse_args(["--config", str(path)])


def test_missing_file_is_named() -> None:
    with pytest.raises(FileNotFoundError, match=r"--config must name a YAML file, got 'no.yaml'"):
        parse_args(["--config", "no.yaml"])


def test_every_recipe_of_the_repository_is_valid() -> None:
    recipes = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
    assert recipes
    for recipe in recipes:
        root = OnlineRun if recipe.stem.startswith("online") else Config
        parse_args_of(root, "mcpo", "", ["--config", str(recipe)])


def test_help_is_grouped_fast_and_needs_no_torch() -> None:
    code = (
        "import sys; from mcpo.train import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    for section in ("Model, precision and placement", "The MC kernel", "AdamW and its schedule"):
        assert section in shown
    for name in option_names():
        assert f"--{name}" in shown


def test_config_is_frozen() -> None:
    config = make_config({})
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.loss.beta = 1.0  # pyright: ignore[reportAttributeAccessIssue]
