"""Completions put to prompts they do not answer: which, how they are packed, and what they cost."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_model, weights, words, write_jsonl
from test_step import groups_of

from mcpo.cli import make_config
from mcpo.metrics import read_metrics
from mcpo.mismatched import with_mismatched
from mcpo.pack import pack, packed_length
from mcpo.policy import Policy, group_logps, mismatched_logps
from mcpo.prepare import Groups, for_losses
from mcpo.tokens import token_hash
from mcpo.train import main

GROUPS = groups_of(8)
MATCHED = with_mismatched(GROUPS, max_length=None)


def giver(ids: tuple[int, ...] | None) -> list[str]:
    return [group.row_id for group in GROUPS if ids in group.candidate_ids]


def test_each_row_gives_one_completion_to_another_row() -> None:
    givers = [giver(group.mismatched_ids) for group in MATCHED]
    assert all(len(found) == 1 for found in givers)
    assert sorted(found[0] for found in givers) == sorted(group.row_id for group in GROUPS)
    assert all(found[0] != group.row_id for found, group in zip(givers, GROUPS, strict=True))


def test_the_choice_depends_on_the_rows_alone() -> None:
    """So that a cache holds for every seed, order and number of processes."""
    backwards = with_mismatched(GROUPS[::-1], max_length=None)
    assert sorted(backwards, key=lambda group: group.row_id) == list(MATCHED)


def test_chosen_and_rejected_completions_are_given() -> None:
    many = [
        replace(group, row_id=f"{copy}-{group.row_id}") for copy in range(50) for group in GROUPS
    ]
    chosen = {group.candidate_ids[0] for group in GROUPS}
    given = [group.mismatched_ids in chosen for group in with_mismatched(many, max_length=None)]
    # 400 fair coins: four standard deviations.
    assert abs(sum(given) - 200) < 40


def test_what_exceeds_the_limit_is_cut() -> None:
    longest = max(len(group.prompt_ids) for group in GROUPS)
    for group, whole in zip(with_mismatched(GROUPS, longest + 1), MATCHED, strict=True):
        assert whole.mismatched_ids is not None
        room = longest + 1 - len(group.prompt_ids)
        assert group.mismatched_ids == whole.mismatched_ids[:room]


def test_a_single_row_is_refused() -> None:
    with pytest.raises(ValueError, match=r"kto needs at least two rows, .*, got 1; give it more"):
        with_mismatched(GROUPS[:1], max_length=None)


@pytest.mark.parametrize("share_prefix", [True, False], ids=["shared", "separate"])
def test_it_is_scored_with_its_prompt_and_changes_no_candidate(share_prefix: bool) -> None:
    policy = Policy(build_model().double(), head_impl="auto", autocast_dtype=None)
    bare, batch = pack(GROUPS, share_prefix=share_prefix), pack(MATCHED, share_prefix=share_prefix)
    assert torch.equal(bare.mask_PC, batch.mask_PC)
    assert torch.equal(bare.length_PC, batch.length_PC)
    tokens = sum(packed_length(group, share_prefix) for group in MATCHED)
    assert batch.layout.num_tokens == tokens > bare.layout.num_tokens
    apart = pack(
        [
            replace(group, candidate_ids=(group.mismatched_ids,), mismatched_ids=None)
            for group in MATCHED
            if group.mismatched_ids
        ],
        share_prefix=share_prefix,
    )
    with torch.no_grad():
        logp_S = policy(batch)
        # The norms of Llama compute in float32.
        same = {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(
            group_logps(logp_S, batch), group_logps(policy(bare), bare), **same
        )
        torch.testing.assert_close(
            mismatched_logps(logp_S, batch), group_logps(policy(apart), apart)[:, 0], **same
        )


def test_a_cache_tells_it_from_other_tokens() -> None:
    hashes = {token_hash(group) for group in (*GROUPS, *MATCHED)}
    assert len(hashes) == 2 * len(GROUPS)


def test_groups_with_and_without_do_not_mix() -> None:
    with pytest.raises(ValueError, match=r"either every group .* or none, got rows 'r0' and 'r1'"):
        pack([MATCHED[0], GROUPS[1]], share_prefix=True)


def test_what_the_losses_need_of_the_rows() -> None:
    groups = Groups(train=tuple(GROUPS), held_out=tuple(GROUPS[:2]), report="")
    assert for_losses(groups, make_config({})) is groups
    paired = for_losses(groups, make_config({"loss_type": ["dpo", "kto"]}))
    assert (paired.train, paired.held_out) == (MATCHED, groups.held_out)
    message = r"infonca needs a score of every completion .*, and 8 of 8 rows lack them, row 'r0'"
    with pytest.raises(ValueError, match=message):
        for_losses(groups, make_config({"loss_type": "infonca"}))


def test_a_resumed_run_goes_on_with_its_running_means(
    arguments: dict[str, Any], tmp_path: Path
) -> None:
    """The second epoch again, from the checkpoint of the first, in a copy of the folder."""
    losses = ["--loss_type", "kto", "bco"]
    arguments |= {"save_steps": 4, "save_total_limit": 5, "learning_rate": 5e-3}
    assert main([*words(arguments), *losses]) == 0
    copied = tmp_path / "copied"
    shutil.copytree(arguments["output_dir"] / "checkpoint-4", copied / "checkpoint-4")
    resumed = [*words(arguments | {"output_dir": copied}), *losses, "--resume"]
    assert main(resumed) == 0
    first, second = weights(arguments["output_dir"]), weights(copied)
    assert all(torch.equal(first[name], second[name]) for name in first)
    lines = read_metrics(arguments["output_dir"] / "metrics.jsonl")
    assert (lines[0]["bco/delta"], lines[0]["kto/z0"]) == (0.0, 0.0)
    # Without the state these would begin at 0 again.
    assert lines[4]["bco/delta"] != 0.0
    names = ("loss", "bco/delta", "kto/z0", "kto/mismatched")
    assert [[line[name] for name in names] for line in read_metrics(copied / "metrics.jsonl")] == [
        [line[name] for name in names] for line in lines[4:]
    ]


def test_a_run_without_scores_cannot_take_a_loss_of_ratings(
    arguments: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.loads(line) for line in Path(arguments["train_data"]).read_text().splitlines()]
    pairs: list[dict[str, object]] = [
        {"prompt": row["prompt"], "chosen": "w1 w2", "rejected": "w3"} for row in rows
    ]
    bare = arguments | {"train_data": write_jsonl(tmp_path / "pairs.jsonl", pairs)}
    assert main([*words(bare), "--loss_type", "nca_rated"]) == 2
    assert "nca_rated needs a score of every completion" in capsys.readouterr().err
    for row in rows:
        for completion in row["completions"]:
            completion["score"] = -completion["rank"]
    scored = arguments | {"train_data": write_jsonl(tmp_path / "scored.jsonl", rows)}
    assert main([*words(scored), "--loss_type", "nca_rated", "--max_steps", "1"]) == 0
