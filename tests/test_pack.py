import time
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mcpo.pack import move, pack, packed_length, split_by_budget
from mcpo.records import TokenizedGroup
from mcpo_kernels.prefix_attention.layout import NO_PARENT

ids = st.lists(st.integers(0, 99), min_size=1, max_size=6).map(tuple)
groups_strategy = st.lists(
    st.builds(
        TokenizedGroup,
        row_id=st.uuids().map(str),
        prompt_ids=ids,
        candidate_ids=st.lists(ids, min_size=1, max_size=5).map(tuple),
    ),
    min_size=1,
    max_size=5,
)


def group(row_id="r", prompt=(1, 2), candidates=((3, 4, 5), (6,))):
    return TokenizedGroup(row_id=row_id, prompt_ids=prompt, candidate_ids=candidates)


def sequences(groups):
    return [(g.prompt_ids, ids) for g in groups for ids in g.candidate_ids]


def context_rows(layout, row):
    """Rows a token may see, itself included, by the definition of the layout."""
    segment = next(
        i
        for i, (s, n) in enumerate(zip(layout.starts, layout.lengths, strict=True))
        if s <= row < s + n
    )
    seen = [
        r
        for a in layout.ancestors(segment)
        for r in range(layout.starts[a], layout.starts[a] + layout.lengths[a])
    ]
    return [*seen, *range(layout.starts[segment], row + 1)]


def test_shared_pack_by_hand():
    batch = pack([group(), group("s", (7,), ((8,), (9, 10)))], share_prefix=True)
    assert batch.row_ids == ("r", "s")
    assert batch.layout.lengths == (2, 2, 0, 1, 0, 1)
    assert batch.layout.parents == (NO_PARENT, 0, 0, NO_PARENT, 3, 3)
    assert batch.token_T.tolist() == [1, 2, 3, 4, 7, 9]
    assert batch.position_T.tolist() == [0, 1, 2, 3, 0, 1]
    assert batch.scored_N.tolist() == [1, 2, 3, 1, 4, 4, 5]
    assert batch.target_N.tolist() == [3, 4, 5, 6, 8, 9, 10]
    assert batch.seq_of_N.tolist() == [0, 0, 0, 1, 2, 3, 3]


def test_separate_pack_by_hand():
    batch = pack([group()], share_prefix=False)
    assert batch.layout.lengths == (4, 2)
    assert batch.layout.parents == (NO_PARENT, NO_PARENT)
    assert batch.token_T.tolist() == [1, 2, 3, 4, 1, 2]
    assert batch.position_T.tolist() == [0, 1, 2, 3, 0, 1]
    assert batch.scored_N.tolist() == [1, 2, 3, 5]


def test_grid_of_a_ragged_pool():
    batch = pack([group(), group("s", (7,), ((8,), (9, 10), (11,)))], share_prefix=True)
    assert batch.num_prompts == 2
    assert batch.num_seqs == 5
    assert batch.seq_of_PC.tolist() == [[0, 1, 0], [2, 3, 4]]
    assert batch.mask_PC.tolist() == [[True, True, False], [True, True, True]]
    assert batch.length_PC.tolist() == [[3, 1, 1], [1, 2, 1]]


@given(groups_strategy, st.booleans())
@settings(max_examples=60, deadline=None)
def test_every_scored_row_sees_exactly_its_own_sequence(groups, share_prefix):
    batch = pack(groups, share_prefix=share_prefix)
    expected = sequences(groups)
    assert batch.num_seqs == len(expected)
    for seq, (prompt, completion) in enumerate(expected):
        rows = batch.scored_N[batch.seq_of_N == seq].tolist()
        assert tuple(batch.target_N[batch.seq_of_N == seq].tolist()) == completion
        for j, row in enumerate(rows):
            context = context_rows(batch.layout, row)
            assert tuple(batch.token_T[context].tolist()) == (*prompt, *completion[:j])
            assert batch.position_T[context].tolist() == list(range(len(context)))


@given(groups_strategy, st.booleans())
@settings(max_examples=60, deadline=None)
def test_shapes_and_types_are_consistent(groups, share_prefix):
    batch = pack(groups, share_prefix=share_prefix)
    num_tokens = sum(packed_length(g, share_prefix) for g in groups)
    assert batch.layout.num_tokens == len(batch.token_T) == len(batch.position_T) == num_tokens
    num_scored = sum(len(c) for _, c in sequences(groups))
    assert len(batch.scored_N) == len(batch.target_N) == len(batch.seq_of_N) == num_scored
    assert (batch.seq_of_N.diff() >= 0).all()
    lengths = torch.bincount(batch.seq_of_N, minlength=batch.num_seqs)
    assert torch.equal(batch.length_PC[batch.mask_PC], lengths)
    assert batch.seq_of_PC[batch.mask_PC].tolist() == list(range(batch.num_seqs))
    tensors = [getattr(batch, name) for name in batch.__slots__ if name.endswith(("_T", "_N"))]
    assert {t.dtype for t in tensors} == {torch.int64}


@given(groups_strategy, st.integers(1, 60), st.booleans())
@settings(max_examples=60, deadline=None)
def test_split_keeps_order_and_budget_and_is_greedy(groups, max_tokens, share_prefix):
    batches = split_by_budget(groups, max_tokens, share_prefix)
    assert [g for b in batches for g in b] == groups
    sizes = [[packed_length(g, share_prefix) for g in b] for b in batches]
    assert all(len(s) == 1 or sum(s) <= max_tokens for s in sizes)
    for size, following in pairwise(sizes):
        assert sum(size) + following[0] > max_tokens


def test_split_of_nothing_is_nothing():
    assert split_by_budget([], 10, True) == []


def test_move_keeps_values_and_layout():
    batch = pack([group()], share_prefix=True)
    moved = move(batch, "meta")
    assert moved.layout is batch.layout
    on_meta = [getattr(moved, n) for n in moved.__slots__]
    assert {t.device.type for t in on_meta if isinstance(t, torch.Tensor)} == {"meta"}
    assert torch.equal(move(batch, "cpu").scored_N, batch.scored_N)


def test_packing_is_negligible_beside_a_forward():
    big = [group(str(i), tuple(range(200)), (tuple(range(200)),) * 8) for i in range(16)]
    pack(big, share_prefix=True)
    begin = time.process_time()
    batch = pack(big, share_prefix=True)
    # 28 672 tokens: a forward of the smallest model takes minutes of CPU on them.
    assert len(batch.token_T) == 16 * (200 + 8 * 199)
    assert time.process_time() - begin < 0.5


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([], "groups must hold at least one group"),
        ([group(prompt=())], "row 'r' has an empty prompt"),
        ([group(candidates=((1,), ()))], r"row 'r' must hold candidates .* got lengths \[1, 0\]"),
        ([group(candidates=())], r"row 'r' must hold candidates .* got lengths \[\]"),
    ],
)
def test_what_cannot_be_packed_is_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        pack(bad, share_prefix=True)


def test_a_budget_must_be_positive():
    with pytest.raises(ValueError, match="max_tokens must be at least 1, got 0"):
        split_by_budget([group()], 0, True)
