"""Which objectives a configuration may name, and what it says of the others."""

from __future__ import annotations

import re
from typing import Any

import pytest

from mcpo.cli import make_config, parse_args
from mcpo.config import LossConfig


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "dpoo"}, "loss_type must be one of mcpo, mcpo_unbiased, rnce, dpo"),
        ({"loss_type": "sigmoid"}, "(sigmoid of TRL is dpo here), got 'sigmoid'"),
        ({"loss_type": ["sppo_hard"]}, "(sppo_hard of TRL is sppo here), got 'sppo_hard'"),
        ({"loss_type": []}, "must name at least one loss, and none twice, got ()"),
        ({"loss_type": ["dpo", "dpo"]}, "none twice, got ('dpo', 'dpo')"),
        ({"loss_weights": [0.5, 0.5]}, "one positive number for each of ('mcpo',), or none"),
        ({"loss_weights": [-1.0]}, "or none, got (-1.0,)"),
        ({"loss_weights": ["nan"]}, "or none, got (nan,)"),
        ({"sft_weight": -0.1}, "sft_weight must be 0 or more, got -0.1"),
        ({"rpo_alpha": "inf"}, "rpo_alpha must be 0 or more, got inf"),
        ({"cpo_alpha": -1}, "cpo_alpha must be 0 or more, got -1.0"),
        ({"beta": 0}, "beta must be positive, got 0.0"),
        ({"rating_temperature": 0}, "rating_temperature must be positive, got 0.0"),
        ({"baseline_decay": 1}, "baseline_decay must be in [0, 1), got 1.0"),
        ({"loss_type": "cdpo", "label_smoothing": 0.5}, "must be in [0, 0.5), got 0.5"),
        ({"loss_type": "exo"}, "exo needs label_smoothing above 0 (its authors take 1e-3)"),
        (
            {"loss_type": "dpo", "label_smoothing": 0.1},
            "label_smoothing is of cdpo, robust, exo, simpo, cpo (dpo with it is cdpo); leave it "
            "at 0 for dpo, got 0.1",
        ),
        ({"loss_type": ["dpo", "sft"], "sft_weight": 1}, "either sft of loss_type or sft_weight"),
        ({"loss_type": "rnce"}, "negatives drawn uniformly (for others it is mcpo): strategy must"),
        (
            {"loss_type": "mcpo_unbiased", "num_negatives": 2},
            "unbiased for one way to draw: strategy mc, score log_ratio, temperature 1, chain none",
        ),
        ({"loss_type": "mcpo_unbiased", "strategy": "max"}, "mcpo_unbiased is unbiased for one"),
        ({"loss_type": "mcpo_unbiased", "score": "logp"}, "mcpo_unbiased is unbiased for one"),
        ({"loss_type": "mcpo_unbiased", "temperature": 2}, "mcpo_unbiased is unbiased for one"),
        ({"loss_type": "mcpo_unbiased", "augmented": True}, "mcpo_unbiased is unbiased for one"),
    ],
    ids=str,
)
def test_refused_objectives(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make_config(options)


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "rnce", "strategy": "random"},
        {"loss_type": "mcpo_unbiased"},
        {"loss_type": "mcpo_unbiased", "num_negatives": 3, "replacement": True},
        {"loss_type": "exo", "label_smoothing": 1e-3},
    ],
    ids=str,
)
def test_objectives_with_what_they_need(options: dict[str, Any]) -> None:
    assert make_config(options).loss.loss_type == (options["loss_type"],)


def test_lists_of_losses_come_from_either_side() -> None:
    """Under the names of TRL, whose loss_type may be one name too."""
    words = ["--loss_type", "dpo", "sft", "--loss_weights", "0.8", "0.2"]
    config = parse_args(words).loss
    assert config == make_config({"loss_type": ["dpo", "sft"], "loss_weights": ["0.8", 0.2]}).loss
    assert config.weighted == (("dpo", 0.8), ("sft", 0.2))
    assert make_config({"loss_type": "hinge"}).loss.weighted == (("hinge", 1.0),)
    assert LossConfig(sft_weight=0.3).weighted == (("mcpo", 1.0), ("sft", 0.3))


def test_help_lists_the_losses(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_args(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "one or several of mcpo, mcpo_unbiased, rnce, dpo," in shown
    assert "orpo, sft (default: mcpo)" in shown
