"""Loading, scoring and comparing verifiable prompts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mcpo.data.instructions import Check
from mcpo.evaluate.generate import Completion
from mcpo.evaluate.verifiable import VerifiableItem, compare, load_items, markdown_table, score

DATA = Path(__file__).resolve().parents[1] / "recipes" / "data"
RECORD = {
    "id": "a",
    "prompt": "Why? Write without commas.",
    "topic": "Why?",
    "checks": [{"kind": "no_commas", "args": {}}],
    "unseen_kind": False,
}


def make_item(name, *kinds, topic=None, unseen=False):
    return VerifiableItem(
        item_id=name,
        prompt=f"Prompt {name}",
        topic=topic or name,
        checks=tuple(Check(kind=kind, args={}) for kind in kinds),
        unseen_kind=unseen,
    )


def say(text, finished=True):
    return Completion(text=text, num_tokens=len(text), finished=finished)


def write_lines(tmp_path, *lines):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def changed(**fields):
    return (json.dumps(RECORD | fields),)


@pytest.mark.parametrize("split", ["validation", "heldout"])
def test_load_items_reads_the_data_of_the_project(split):
    items = load_items(DATA / f"verifiable_{split}_prompts.jsonl")
    assert len({item.item_id for item in items}) == len(items) > 80
    assert any(item.unseen_kind for item in items) == (split == "heldout")


def test_load_items(tmp_path):
    (item,) = load_items(write_lines(tmp_path, json.dumps(RECORD)))
    assert item == VerifiableItem(
        item_id="a",
        prompt=RECORD["prompt"],
        topic="Why?",
        checks=(Check(kind="no_commas", args={}),),
        unseen_kind=False,
    )


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ((), r"must hold at least one prompt; it is empty"),
        (("{}", "not json"), r"jsonl:1 must have the fields .*; it lacks \['id'"),
        ((json.dumps(RECORD), "not json"), r"jsonl:2 is not valid JSON: Expecting value"),
        (("3",), r"jsonl:1 must hold one JSON object, got int"),
        (("[" * 100_000,), r"jsonl:1 is not valid JSON: maximum recursion"),
        (changed(prompt=3), r"jsonl:1: column 'prompt' must be text, got int 3"),
        (changed(prompt="\ud83d"), r"jsonl:1: column 'prompt' must be text without lone"),
        (changed(topic=None), r"jsonl:1: column 'topic' must be text, got None"),
        (
            changed(unseen_kind="no"),
            r"jsonl:1: column 'unseen_kind' must be true or false",
        ),
        (changed(checks=[]), r"jsonl:1: checks must hold at least one, got none"),
        (changed(checks="no_commas"), r"jsonl:1: column 'checks' must be a list of objects, got "),
        (changed(checks=["no_commas"]), r"column 'checks\[0\]' must be an object, got str"),
        (changed(checks=[{"kind": "no_commas"}]), r"jsonl:1, checks\[0\] has no column 'args'"),
        (
            changed(checks=[{"kind": "rhymes", "args": {}}]),
            r"jsonl:1, checks\[0\]: kind must be one of .*, got 'rhymes'",
        ),
        (
            changed(checks=[{"kind": "at_most_words", "args": {}}]),
            r"jsonl:1, checks\[0\]: args of at_most_words must be \{most: int\}, .* got \{\}",
        ),
        (
            changed(checks=[{"kind": "at_most_words", "args": {"most": "10"}}]),
            r"args of at_most_words must be \{most: int\}, .* got \{'most': '10'\}",
        ),
    ],
)
def test_load_items_says_what_is_wrong(tmp_path, lines, message):
    with pytest.raises(ValueError, match=message):
        load_items(write_lines(tmp_path, *lines))


def test_load_items_says_where_there_is_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"must be in a JSONL file, .*, which is a folder;"):
        load_items(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"gone\.jsonl, which is not there;"):
        load_items(tmp_path / "gone.jsonl")


def test_score_checks_each_instruction_and_the_end():
    items = [make_item("a", "no_commas", "has_number"), make_item("b", "no_commas")]
    answers = [say("It was, in 1969, there."), say("It was there", finished=False)]
    assert score(items, answers) == [(False, True), (False,)]


def test_score_needs_an_answer_for_every_item():
    with pytest.raises(ValueError, match="got 1 items and 0 completions"):
        score([make_item("a", "no_commas")], [])


def test_compare_by_part():
    items = [
        make_item("a", "no_commas", "has_number", topic="t"),
        make_item("b", "no_commas", topic="t"),
        make_item("c", "no_digits", unseen=True),
    ]
    before = [(False, False), (True,), (False,)]
    after = [(True, False), (True,), (True,)]
    results = compare(items, before, after)
    assert list(results) == [
        "all",
        "seen kinds",
        "unseen kinds",
        "no_commas",
        "has_number",
        "no_digits",
    ]
    assert (results["all"].num_checks, results["all"].num_clusters) == (4, 2)
    assert (results["all"].before.mean, results["all"].after.mean) == (0.25, 0.75)
    assert results["no_commas"].difference.mean == 0.5
    assert results["unseen kinds"].num_checks == 1
    table = markdown_table(results)
    assert "| no_digits | 1 | 0.0 ± 0.0 | 100.0 ± 0.0 | +100.0 ± 0.0 | 1 |" in table
    assert table.count("\n") == 7


def test_compare_needs_scores_for_every_item():
    with pytest.raises(ValueError, match="must have the same length; got 1, 0 and 1"):
        compare([make_item("a", "no_commas")], [], [(True,)])
