"""Grading samples and turning them into preference rows."""

from __future__ import annotations

import json

import pytest

from mcpo.data import load_rows
from mcpo.data.instructions import Check
from mcpo.data.prompts import VerifiablePrompt
from mcpo.data.verifiable_rows import Sample, candidate_row, drop_reason, grade, prompt_record

ONE = (Check(kind="no_commas", args={}),)
TWO = (*ONE, Check(kind="at_most_words", args={"most": 4}))


def make_prompt(checks):
    return VerifiablePrompt(
        prompt_id="train-0001", split="train", topic="Why?", text="Why? Be brief.", checks=checks
    )


def make_sample(text, temperature=0.4, index=0, finished=True):
    return Sample(
        text=text, temperature=temperature, index=index, finished=finished, num_tokens=len(text)
    )


def test_best_first_and_among_equals_the_cooler_then_the_earlier():
    samples = [
        make_sample("so it is warm", 1.0, 0),
        make_sample("so it is, here", 0.4, 0),
        make_sample("so it is late", 0.4, 1),
        make_sample("so it is cold", 0.4, 0),
    ]
    graded = grade(make_prompt(ONE), samples)
    assert [g.sample.text.split()[-1] for g in graded] == ["cold", "late", "warm", "here"]
    assert [g.score for g in graded] == [1, 1, 1, 0]


def test_all_samples_are_kept_and_ranks_follow_scores():
    samples = [
        make_sample("so it is cold"),
        make_sample("so it is warm", index=1),
        make_sample("so it is, here", 0.7),
        make_sample("so it is here and there", 0.7, 1),
        make_sample("so, it is here and there", 1.0),
        make_sample("so it is cut", 1.0, 1, finished=False),
    ]
    row = candidate_row(make_prompt(TWO), grade(make_prompt(TWO), samples))
    assert [(c["text"], c["score"], c["rank"]) for c in row["completions"]] == [
        ("so it is cold", 1, 1),
        ("so it is warm", 1, 1),
        ("so it is, here", 0.5, 2),
        ("so it is here and there", 0.5, 2),
        ("so, it is here and there", 0, 3),
        ("so it is cut", 0, 3),
    ]
    assert row["completions"][5]["finished"] is False
    assert (row["id"], row["prompt"]) == ("train-0001", "Why? Be brief.")
    assert row["checks"][1] == {"kind": "at_most_words", "args": {"most": 4}}


def test_the_reader_leaves_a_strictly_worse_pool(tmp_path):
    samples = [
        make_sample("so it is"),
        make_sample("so it was"),
        make_sample("so, it is"),
        make_sample("so, it is", 1.0),
    ]
    row = candidate_row(make_prompt(ONE), grade(make_prompt(ONE), samples))
    assert len(row["completions"]) == 4
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    (read,) = load_rows([str(path)]).rows
    assert [candidate.text for candidate in read.candidates] == ["so it is", "so, it is"]


@pytest.mark.parametrize(
    ("texts", "reason"),
    [
        (["so, it is", "so, it was"], "no completion passes"),
        (["so it is", "so it was"], "all completions pass"),
        (["so it is", "so, it was"], None),
    ],
)
def test_prompts_without_contrast_make_no_row(texts, reason):
    graded = grade(make_prompt(ONE), [make_sample(text) for text in texts])
    assert drop_reason(graded) == reason
    assert (candidate_row(make_prompt(ONE), graded) is None) == (reason is not None)


def test_half_passed_is_not_good_enough_for_the_chosen_one():
    samples = [make_sample("so it is here and there"), make_sample("so, it is here and there")]
    graded = grade(make_prompt(TWO), samples)
    assert [g.score for g in graded] == [0.5, 0]
    assert candidate_row(make_prompt(TWO), graded) is None


def test_prompt_record_holds_what_the_evaluation_needs():
    assert prompt_record(make_prompt(ONE)) == {
        "id": "train-0001",
        "prompt": "Why? Be brief.",
        "topic": "Why?",
        "checks": [{"kind": "no_commas", "args": {}}],
        "unseen_kind": False,
    }
