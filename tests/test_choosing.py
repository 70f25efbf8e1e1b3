"""The guide to losses and samplers agrees with the code that it is about."""

from __future__ import annotations

import re

import pytest
import torch
from conftest import ROOT

from benchmarks.choosing import __main__ as choosing
from benchmarks.choosing.shapes import value
from benchmarks.choosing.toy import COMPLETIONS, policy, train
from mcpo.cli import make_config
from mcpo.config import LOSS_TYPES

PAGE = (ROOT / "docs" / "choosing.md").read_text()


@pytest.mark.parametrize(
    "names", ["dpo nca", pytest.param(" ".join(LOSS_TYPES), marks=pytest.mark.slow)]
)
def test_rows_of_the_table_are_those_that_the_losses_give(names: str) -> None:
    for name in names.split():
        assert choosing.loss_row(name, train(choosing.config_of(name))) in PAGE.splitlines()


def test_rows_of_the_other_tables_too() -> None:
    outcome = train(make_config({"beta": choosing.BETA, "strategy": "max"}))
    assert choosing.sampler_row("max", outcome) in PAGE.splitlines()
    options = choosing.REMEDIES["`sppo`"]
    outcome = train(make_config({"beta": choosing.BETA} | options), pool=1)
    assert choosing.falls_row("`sppo`", outcome) in PAGE.splitlines()


def test_the_example_is_as_described() -> None:
    bias_Y, feature_YD = policy()
    unit_YD = feature_YD / feature_YD.norm(dim=1, keepdim=True)
    assert bias_Y.shape == (COMPLETIONS,) == (16,)
    assert unit_YD.shape[1] == 8
    cosine = (unit_YD[1:6] @ unit_YD[0]).tolist()
    assert cosine == pytest.approx([0.9, 0.7, 0.5, 0.25, 0.0], abs=1e-12)


def test_every_loss_has_a_row_and_a_panel() -> None:
    figure = (ROOT / "docs" / "figures" / "losses.svg").read_text()
    assert [name for name in LOSS_TYPES if f"| `{name}` |" not in PAGE] == []
    assert [name for name in LOSS_TYPES if not re.search(rf">\s*{name}\s*</text>", figure)] == []


def test_a_panel_shows_the_loss_of_a_pair() -> None:
    moves = torch.tensor([-10.0, 0.0, 10.0], dtype=torch.float64)
    config = make_config({"loss_type": "dpo", "beta": 0.1}).loss
    expected = -torch.nn.functional.logsigmoid(0.1 * moves)
    torch.testing.assert_close(value("dpo", config, moves, torch.zeros_like(moves)), expected)
    torch.testing.assert_close(value("dpo", config, torch.zeros_like(moves), -moves), expected)


def test_every_metric_has_its_range() -> None:
    step = (ROOT / "mcpo" / "step.py").read_text()
    metrics = set(re.findall(r'"((?:rewards|logps|mc|bco|kto)/\w+)"', step))
    assert {"kto/z0", "bco/delta", "mc/ess"} <= metrics
    assert [name for name in sorted(metrics) if f"`{name}`" not in PAGE] == []
