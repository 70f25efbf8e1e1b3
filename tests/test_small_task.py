"""The small verifiable task: prompts, the texts learnt first, and the files that are made."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from mcpo.cli import make_config, read_yaml
from mcpo.data import make_small, small_task
from mcpo.data.instructions import passes, require_args
from mcpo.data.rows import load_rows
from mcpo.evaluate.verifiable import load_items

SPLITS = (("train", 40), ("validation", 10), ("heldout", 10))
PROMPTS = small_task.build(SPLITS, seed=0)


def test_prompts_are_different_and_can_be_obeyed() -> None:
    assert [sum(p.split == split for p in PROMPTS) for split, _ in SPLITS] == [40, 10, 10]
    assert len({prompt.text for prompt in PROMPTS}) == len(PROMPTS)
    draw = random.Random(1)
    for prompt in PROMPTS:
        for check in prompt.checks:
            require_args(check)
        text = small_task.obeying(prompt.checks, draw)
        assert text is not None
        assert all(passes(check, text, finished=True) for check in prompt.checks)


def test_a_share_of_the_learnt_texts_obeys(monkeypatch: pytest.MonkeyPatch) -> None:
    def share() -> float:
        draw = random.Random(2)
        obeyed = [
            all(
                passes(c, small_task.learnt_text(prompt, draw), finished=True)
                for c in (prompt.checks[0],)
            )
            for prompt in PROMPTS * 5
        ]
        return sum(obeyed) / len(obeyed)

    mixed = share()
    monkeypatch.setattr(small_task, "OBEYING", 1.0)
    assert share() == 1.0
    monkeypatch.setattr(small_task, "OBEYING", 0.0)
    assert share() < mixed < 1.0


def test_the_tokenizer_knows_every_word() -> None:
    tokenizer = make_small.make_tokenizer()
    draw = random.Random(3)
    for prompt in PROMPTS:
        chat = [{"role": "user", "content": prompt.text}]
        shown: Any = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        ids = tokenizer.encode(f"{shown}{small_task.random_text(draw)} <|end|>")
        assert tokenizer.unk_token_id not in ids
        # What is learnt first begins as what is asked later.
        begin, count = make_small._learnt_ids(tokenizer, prompt, draw)
        assert begin[:count] == tokenizer.encode(shown)


@pytest.mark.slow
def test_what_is_made_can_be_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("SPLITS", SPLITS), ("TEXTS", 512), ("EPOCHS", 4), ("BATCH", 16)):
        monkeypatch.setattr(make_small, name, value)
    make_small.main(["--output", str(tmp_path)])
    assert "of the samples pass" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert 150_000 < model.num_parameters() < 250_000
    assert [len(load_items(tmp_path / f"{split}_prompts.jsonl")) for split, _ in SPLITS] == [
        40,
        10,
        10,
    ]
    rows = load_rows([str(tmp_path / "train.jsonl")]).rows
    assert rows
    line = json.loads((tmp_path / "train.jsonl").read_text().splitlines()[0])
    assert {one["model"] for one in line["completions"]} == {make_small.MODEL}
    made = (tmp_path / "train.jsonl").read_text()
    make_small.main(["--output", str(tmp_path)])
    assert (tmp_path / "train.jsonl").read_text() == made


def test_the_recipe_is_a_configuration() -> None:
    config = make_config(read_yaml("recipes/studies/small.yaml"))
    assert config.run.heldout_max_new_tokens == make_small.MAX_NEW_TOKENS
