"""Real preference data, where it is at hand: every file through rows, tokens and packs.

``MCPO_SHARED`` names the folder; without it the sibling ``shared`` of the repository is tried.
"""

import os
from pathlib import Path

import pytest

from mcpo.data import RowOptions, SourceSpec, load_rows
from mcpo.findings import counts
from mcpo.models import smollm2_folder
from mcpo.pack import pack, packed_length
from mcpo.tokens import TokenConfig, tokenize

SHARED = Path(os.environ.get("MCPO_SHARED", Path(__file__).parents[2] / "shared"))
DATA = SHARED / "data"

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"there is no folder {DATA}")

# File: rows left, and everything dropped on the way.
FILES = {
    "candidates_train.jsonl.gz": (600, {}),
    "candidates_lenbal_train.jsonl.gz": (593, {}),
    "nectar_format_train.jsonl.gz": (637, {"second_best": 667, "empty_pool": 30}),
    "nectar_real_row.jsonl": (1, {"second_best": 1}),
    "ultrafeedback_format_train.jsonl": (198, {"tied_with_chosen": 24, "empty_pool": 2}),
    "dpo_pairs_train.jsonl": (361, {}),
    "dpo_pairs_multiturn.jsonl": (119, {}),
    "oasst_ranked_train.jsonl": (123, {}),
}


@pytest.fixture(scope="module")
def smollm2():
    """The tokenizer alone, if its package is installed."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(smollm2_folder())
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", FILES)
def test_every_file_is_read_with_the_best_chosen(name):
    report = load_rows([str(DATA / name)])
    num_rows, found = FILES[name]
    assert len(report.rows) == num_rows
    assert counts(report.findings) == found
    for row in report.rows:
        chosen = row.chosen
        if chosen.rank is not None:
            assert chosen.rank == 1
            assert all(rival.rank > 1 for rival in row.pool)
        elif chosen.score is not None:
            # Some published pairs carry equal scores: the label decides there, and only there.
            assert all(rival.score <= chosen.score for rival in row.pool)


def test_the_judge_agrees_with_the_ranks():
    rows = load_rows([str(DATA / "candidates_train.jsonl.gz")]).rows
    assert all(row.chosen.score > max(rival.score for rival in row.pool) for row in rows)


def test_nectar_and_candidates_say_the_same_of_the_same_rows():
    nectar = load_rows(
        [str(DATA / "nectar_format_train.jsonl.gz")], options=RowOptions(nectar_drop_second=False)
    ).rows
    candidates = load_rows([str(DATA / "candidates_train.jsonl.gz")]).rows
    for ours, theirs in zip(nectar[:600], candidates, strict=True):
        assert ours.prompt == ({"role": "user", "content": theirs.prompt},)
        assert [c.text for c in ours.candidates] == [c.text for c in theirs.candidates]


def test_multi_turn_nectar_has_the_turns_of_its_source():
    nectar = load_rows(
        [str(DATA / "nectar_format_train.jsonl.gz")], options=RowOptions(nectar_drop_second=False)
    ).rows[600:]
    oasst = [row.prompt for row in load_rows([str(DATA / "oasst_ranked_train.jsonl")]).rows]
    assert len(nectar) == 67
    assert all(len(row.prompt) > 1 and row.prompt in oasst for row in nectar)


@pytest.mark.parametrize("name", FILES)
def test_every_file_is_tokenized_with_one_end_each(name, smollm2):
    rows = load_rows([SourceSpec(path=str(DATA / name), max_rows=100)]).rows
    report = tokenize(rows, smollm2, TokenConfig(max_length=None))
    eos = smollm2.eos_token_id
    texts = {row.row_id: {one.text for one in row.candidates} for row in rows}
    assert len(report.groups) == len(rows)
    for group in report.groups:
        assert smollm2.decode(group.prompt_ids).endswith("<|im_start|>assistant\n")
        for ids in group.candidate_ids:
            assert ids.count(eos) == 1
            assert ids[-1] == eos
            assert smollm2.decode(ids[:-1]) in texts[group.row_id]


@pytest.mark.parametrize(
    ("too_long", "kinds"),
    [
        ("drop", {"prompt_too_long", "chosen_too_long", "completion_too_long", "empty_pool"}),
        ("truncate_completion", {"prompt_too_long", "truncated_completion"}),
        ("truncate_prompt", {"truncated_prompt", "chosen_too_long", "completion_too_long"}),
    ],
)
def test_limits_hold_on_real_rows(too_long, kinds, smollm2):
    sources = [SourceSpec(path=str(DATA / name), max_rows=40) for name in FILES]
    config = TokenConfig(max_length=200, too_long=too_long)
    report = tokenize(load_rows(sources).rows, smollm2, config)
    assert max(len(g.prompt_ids) + len(c) for g in report.groups for c in g.candidate_ids) <= 200
    assert counts(report.findings).keys() >= kinds
    if too_long != "truncate_completion":
        ends = {ids[-1] for group in report.groups for ids in group.candidate_ids}
        assert ends == {smollm2.eos_token_id}


def test_a_shared_prompt_saves_tokens_on_real_rows(smollm2):
    rows = load_rows([str(DATA / "candidates_train.jsonl.gz")]).rows[:8]
    groups = tokenize(rows, smollm2, TokenConfig()).groups
    shared, separate = (pack(groups, share_prefix=share) for share in (True, False))
    assert shared.target_N.equal(separate.target_N)
    assert len(shared.token_T) == sum(packed_length(group, True) for group in groups)
    saved = sum(len(g.prompt_ids) * (g.num_candidates - 1) for g in groups)
    assert len(separate.token_T) - len(shared.token_T) == saved
