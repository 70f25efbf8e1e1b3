"""Scores of the data, on their way to the losses and draws that look at them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_step import groups_of
from test_tokens import make_tokenizer, texts

from mcpo.pack import pack
from mcpo.records import Candidate, CandidateRow
from mcpo.tokens import TokenConfig, tokenize

GROUPS = groups_of(4)


def rated(*candidates: tuple[str, float | None, float | None]) -> CandidateRow:
    """A row of (text, score, rank)."""
    chosen, *pool = [
        Candidate(text=text, score=score, rank=rank) for text, score, rank in candidates
    ]
    return CandidateRow(row_id="r", prompt="q", chosen=chosen, pool=tuple(pool))


def test_ratings_stay_with_their_candidates() -> None:
    """Though one is empty, one too long, one equal to the chosen and one to another."""
    lots = [("yes", 9.0), ("", 8.0), ("no", 7.0), ("1" * 30, 6.0), ("yes", 5.0), ("no", 4.0)]
    one = rated(*((*each, None) for each in [*lots, ("maybe", 3.0)]))
    config = TokenConfig(prompt_format="plain", max_length=12, too_long="drop")
    (group,) = tokenize([one], make_tokenizer(), config).groups
    assert texts(make_tokenizer(), group)[1] == ["yes<|im_end|>", "no<|im_end|>", "maybe<|im_end|>"]
    assert group.scores == (9.0, 7.0, 3.0)


@pytest.mark.parametrize(
    ("candidates", "expected"),
    [
        ([("a", 2.0, 1.0), ("b", 0.5, 2.0)], (2.0, 0.5)),
        ([("a", None, 1.0), ("b", 0.5, 2.5)], (None, 0.5)),
        ([("a", None, 1.0), ("b", None, 2.0)], ()),
    ],
    ids=["scores", "some", "ranks"],
)
def test_ranks_are_no_scores(
    candidates: list[tuple[str, float | None, float | None]], expected: tuple[float | None, ...]
) -> None:
    (group,) = tokenize([rated(*candidates)], make_tokenizer(), TokenConfig()).groups
    assert group.scores == expected


def test_scores_that_do_not_fit_are_refused() -> None:
    broken = replace(GROUPS[0], scores=(1.0,))
    with pytest.raises(ValueError, match="row 'r0' must have one score, or None, for each of its"):
        pack([broken], share_prefix=True)


def test_scores_stand_by_their_candidates() -> None:
    rated = [
        replace(group, scores=tuple(10.0 * place + 1 for place in range(group.num_candidates)))
        for group in GROUPS
    ]
    batch = pack(rated, share_prefix=True)
    columns = torch.arange(batch.mask_PC.shape[1]).expand(batch.mask_PC.shape)
    expected_PC = (10.0 * columns + 1).double().masked_fill(~batch.mask_PC, torch.nan)
    assert torch.equal(batch.external_score_PC.nan_to_num(-1), expected_PC.nan_to_num(-1))
    mixed = pack([rated[0], GROUPS[1]], share_prefix=True)
    assert bool(mixed.external_score_PC[1].isnan().all())
