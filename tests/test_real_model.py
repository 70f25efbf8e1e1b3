"""The real model, cut to four layers, on real preference data where it is at hand."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from mcpo.metrics import read_metrics
from mcpo.models import SMOLLM2, load_model
from mcpo.train import main

SHARED = Path(os.environ.get("MCPO_SHARED", Path(__file__).parents[2] / "shared"))
CANDIDATES = SHARED / "data" / "candidates_train.jsonl.gz"


@pytest.fixture(scope="module")
def four_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct without all but its first four layers."""
    try:
        model, tokenizer = load_model(SMOLLM2, dtype=torch.float32)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("four-layers")
    model.model.layers = model.model.layers[:4]
    model.config.num_hidden_layers = 4
    model.config.layer_types = None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.skipif(not CANDIDATES.is_file(), reason=f"there is no file {CANDIDATES}")
def test_a_few_steps_on_real_candidates_lower_the_loss(four_layers: Path, tmp_path: Path) -> None:
    """The same two groups again and again: the loss on them has to fall."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"train_data: [{{path: {CANDIDATES}, max_rows: 2}}]\n")
    settings = {
        "config": recipe,
        "model_name_or_path": four_layers,
        "max_length": 192,
        "per_device_train_batch_size": 2,
        "max_steps": 6,
        "learning_rate": 5e-5,
        "lr_scheduler_type": "constant",
        "warmup_ratio": 0,
        "output_dir": tmp_path / "run",
        "reference_cache_dir": tmp_path / "cache",
    }
    assert (
        main([word for name, value in settings.items() for word in (f"--{name}", str(value))]) == 0
    )
    losses = [line["loss"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert losses[0] == pytest.approx(0.6931, abs=0.02)
    assert losses[-1] < 0.9 * losses[0]
