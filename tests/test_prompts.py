"""Prompts: splits that do not touch, balanced kinds, reproducible."""

from __future__ import annotations

from collections import Counter

import pytest

from mcpo.data.instructions import KINDS, UNSEEN_KINDS
from mcpo.data.prompts import SPLITS, build_prompts, put_in_words, read_topics


@pytest.fixture(scope="module")
def prompts():
    return build_prompts(0, read_topics())


def test_splits_share_no_topic_and_no_prompt(prompts):
    topics = {split: {p.topic for p in prompts if p.split == split} for split in SPLITS}
    assert not topics["train"] & topics["validation"]
    assert not topics["train"] & topics["heldout"]
    assert not topics["validation"] & topics["heldout"]
    assert len({p.text for p in prompts}) == len({p.prompt_id for p in prompts}) == len(prompts)


def test_unseen_kinds_are_asked_for_in_the_heldout_split_alone(prompts):
    for split in SPLITS:
        kinds = {check.kind for p in prompts if p.split == split for check in p.checks}
        expected = set(KINDS) if split == "heldout" else set(KINDS) - set(UNSEEN_KINDS)
        assert kinds == expected
    assert {p.split for p in prompts if p.unseen_kind} == {"heldout"}


def test_kinds_are_balanced_and_some_prompts_have_two(prompts):
    train = [p for p in prompts if p.split == "train"]
    singles = Counter(p.checks[0].kind for p in train if len(p.checks) == 1)
    assert max(singles.values()) <= min(singles.values()) + 4
    pairs = sum(len(p.checks) == 2 for p in train)
    assert 0.1 < pairs / len(train) < 0.3


def test_prompt_says_the_topic_first_and_every_instruction(prompts):
    for prompt in prompts:
        assert prompt.text.startswith(prompt.topic + " ")
        for check in prompt.checks:
            said = [put_in_words(text, check.args) for text in KINDS[check.kind].phrasings]
            assert any(text in prompt.text for text in said), prompt


def test_same_seed_same_prompts(prompts):
    assert build_prompts(0, read_topics()) == prompts
    assert build_prompts(1, read_topics()) != prompts


def test_plural_follows_the_count():
    assert put_in_words("{count} sentence(s)", {"count": 1}) == "1 sentence"
    assert put_in_words("{count} sentence(s)", {"count": 2}) == "2 sentences"


def test_topic_listed_twice(tmp_path):
    path = tmp_path / "topics.yaml"
    path.write_text("a:\n  - What is art?\nb:\n  - What is art?\n")
    with pytest.raises(ValueError, match=r"every topic must be listed once.*What is art"):
        read_topics(path)
