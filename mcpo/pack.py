"""Stage 3: tokenized groups laid end to end, without padding.

With a shared prefix a group is ``[prompt | candidate 0 | candidate 1 | ...]`` and every candidate
continues the prompt; without, every candidate is a sequence of its own that begins with a copy of
the prompt. Either way each candidate starts at the position that follows its prompt, and its last
token is a target only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor

from mcpo.records import PackedBatch, TokenizedGroup
from mcpo_kernels.prefix_attention.layout import NO_PARENT, PrefixLayout


def packed_length(group: TokenizedGroup, share_prefix: bool) -> int:
    """Input tokens of a group once packed."""
    prompts = 1 if share_prefix else len(group.scored_ids)
    return prompts * len(group.prompt_ids) + sum(len(ids) - 1 for ids in group.scored_ids)


def split_by_budget(
    groups: Sequence[TokenizedGroup], max_tokens: int, share_prefix: bool
) -> list[list[TokenizedGroup]]:
    """Cut groups, in their order, into micro-batches of at most ``max_tokens`` input tokens.

    A group is never cut: one that is larger than the budget goes alone.

    Raises:
        ValueError: ``max_tokens`` is not positive.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
    batches: list[list[TokenizedGroup]] = []
    used = 0
    for group in groups:
        length = packed_length(group, share_prefix)
        if not batches or used + length > max_tokens:
            batches.append([])
            used = 0
        batches[-1].append(group)
        used += length
    return batches


def pack(groups: Sequence[TokenizedGroup], *, share_prefix: bool) -> PackedBatch:
    """Lay groups end to end; sequences are numbered group by group, candidate by candidate.

    A mismatched completion lies behind the candidates of its group.

    Raises:
        ValueError: no groups, or a group with an empty prompt, an empty candidate or no candidates,
            with scores of another number, or unlike the others in having a mismatched completion.
    """
    _check(groups)
    segments = _shared_segments(groups) if share_prefix else _separate_segments(groups)
    layout = PrefixLayout(tuple(len(ids) for ids in segments.token_ids), tuple(segments.parents))
    length_S = torch.tensor([len(ids) for group in groups for ids in group.scored_ids])
    seq_of_PC, mask_PC, length_PC = _grid(groups, length_S)
    return PackedBatch(
        row_ids=tuple(group.row_id for group in groups),
        token_T=_flat(segments.token_ids),
        position_T=_counting(torch.tensor(segments.positions), torch.tensor(layout.lengths)),
        layout=layout,
        scored_N=_scored_rows(segments, layout, length_S),
        target_N=_flat([ids for group in groups for ids in group.scored_ids]),
        seq_of_N=torch.arange(len(length_S)).repeat_interleave(length_S),
        num_seqs=len(length_S),
        segment_of_S=tuple(segments.own_segment_S),
        seq_of_PC=seq_of_PC,
        mask_PC=mask_PC,
        length_PC=length_PC,
        external_score_PC=_external_scores(groups, mask_PC),
        mismatched_P=_mismatched(groups),
        columns=tuple(group.columns or tuple(range(group.num_candidates)) for group in groups),
    )


def move(batch: PackedBatch, device: torch.device | str) -> PackedBatch:
    """The same batch with its tensors on ``device``."""
    return replace(
        batch,
        token_T=batch.token_T.to(device),
        position_T=batch.position_T.to(device),
        scored_N=batch.scored_N.to(device),
        target_N=batch.target_N.to(device),
        seq_of_N=batch.seq_of_N.to(device),
        seq_of_PC=batch.seq_of_PC.to(device),
        mask_PC=batch.mask_PC.to(device),
        length_PC=batch.length_PC.to(device),
        external_score_PC=batch.external_score_PC.to(device),
        mismatched_P=None if batch.mismatched_P is None else batch.mismatched_P.to(device),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Segments:
    """What lies in the pack, segment by segment, and where each sequence finds its rows."""

    token_ids: list[tuple[int, ...]]
    positions: list[int]
    """Of the first token of each segment."""
    parents: list[int]
    prompt_segment_S: list[int]
    """The segment that holds the last prompt token of each sequence."""
    own_segment_S: list[int]
    """The segment that holds the candidate's tokens."""
    prompt_length_S: list[int]


def _shared_segments(groups: Sequence[TokenizedGroup]) -> _Segments:
    """The prompt once, then what of each candidate is input."""
    found = _Segments(
        token_ids=[],
        positions=[],
        parents=[],
        prompt_segment_S=[],
        own_segment_S=[],
        prompt_length_S=[],
    )
    for group in groups:
        prompt_segment = len(found.token_ids)
        prompt_length = len(group.prompt_ids)
        num_scored = len(group.scored_ids)
        found.token_ids.append(group.prompt_ids)
        found.token_ids.extend(ids[:-1] for ids in group.scored_ids)
        found.positions.extend((0, *(prompt_length,) * num_scored))
        found.parents.extend((NO_PARENT, *(prompt_segment,) * num_scored))
        found.prompt_segment_S.extend((prompt_segment,) * num_scored)
        found.own_segment_S.extend(range(prompt_segment + 1, prompt_segment + 1 + num_scored))
        found.prompt_length_S.extend((prompt_length,) * num_scored)
    return found


def _separate_segments(groups: Sequence[TokenizedGroup]) -> _Segments:
    """Each candidate behind its own copy of the prompt."""
    token_ids = [(*group.prompt_ids, *ids[:-1]) for group in groups for ids in group.scored_ids]
    own = list(range(len(token_ids)))
    return _Segments(
        token_ids=token_ids,
        positions=[0] * len(own),
        parents=[NO_PARENT] * len(own),
        prompt_segment_S=own,
        own_segment_S=own,
        prompt_length_S=[len(group.prompt_ids) for group in groups for _ in group.scored_ids],
    )


def _scored_rows(segments: _Segments, layout: PrefixLayout, length_S: Tensor) -> Tensor:
    """Row of the token before each completion token: the prompt's last, then the candidate's."""
    start = torch.tensor(layout.starts)
    prompt_length_S = torch.tensor(segments.prompt_length_S)
    prompt_segment_S = torch.tensor(segments.prompt_segment_S)
    own_segment_S = torch.tensor(segments.own_segment_S)
    last_prompt_row_S = start[prompt_segment_S] + prompt_length_S - 1
    # A candidate's rows begin after the copy of its prompt; a shared prompt lies elsewhere.
    behind_S = torch.where(own_segment_S == prompt_segment_S, prompt_length_S, 0)
    scored_N = _counting(start[own_segment_S] + behind_S - 1, length_S)
    first_S = length_S.cumsum(0) - length_S
    scored_N[first_S] = last_prompt_row_S
    return scored_N


def _grid(groups: Sequence[TokenizedGroup], length_S: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``seq_of_PC``, ``mask_PC`` and ``length_PC``."""
    num_P = torch.tensor([group.num_candidates for group in groups])
    mask_PC = torch.arange(int(num_P.max())) < num_P[:, None]
    candidate_S = torch.tensor(
        [place < group.num_candidates for group in groups for place in range(len(group.scored_ids))]
    )
    seq_of_PC = torch.zeros(mask_PC.shape, dtype=torch.int64)
    seq_of_PC[mask_PC] = torch.arange(len(length_S))[candidate_S]
    length_PC = torch.ones(mask_PC.shape, dtype=torch.int64)
    length_PC[mask_PC] = length_S[candidate_S]
    return seq_of_PC, mask_PC, length_PC


def _external_scores(groups: Sequence[TokenizedGroup], mask_PC: Tensor) -> Tensor:
    """``external_score_PC``."""
    score_PC = torch.full(mask_PC.shape, torch.nan, dtype=torch.float64)
    for row_C, group in zip(score_PC, groups, strict=True):
        known = [torch.nan if score is None else score for score in group.scores]
        row_C[: len(known)] = torch.tensor(known, dtype=torch.float64)
    return score_PC


def _mismatched(groups: Sequence[TokenizedGroup]) -> Tensor | None:
    """``mismatched_P``: the last sequence of each group."""
    if groups[0].mismatched_ids is None:
        return None
    return torch.tensor([len(group.scored_ids) for group in groups]).cumsum(0) - 1


def _flat(runs: Sequence[tuple[int, ...]]) -> Tensor:
    """All numbers of all runs in one int64 tensor."""
    return torch.tensor(list(chain.from_iterable(runs)), dtype=torch.int64)


def _counting(first: Tensor, lengths: Tensor) -> Tensor:
    """For each run: first, first + 1, ... ``lengths`` times, laid end to end."""
    begin = lengths.cumsum(0) - lengths
    return torch.arange(int(lengths.sum())) + (first - begin).repeat_interleave(lengths)


def _check(groups: Sequence[TokenizedGroup]) -> None:
    if not groups:
        raise ValueError("groups must hold at least one group to pack, got none")
    for group in groups:
        if not group.prompt_ids:
            raise ValueError(
                f"row {group.row_id!r} has an empty prompt; the first completion token "
                "needs a token before it"
            )
        if not group.candidate_ids or not all(group.candidate_ids):
            raise ValueError(
                f"row {group.row_id!r} must hold candidates of at least one token each, got "
                f"lengths {[len(ids) for ids in group.candidate_ids]}"
            )
        if group.scores and len(group.scores) != group.num_candidates:
            raise ValueError(
                f"row {group.row_id!r} must have one score, or None, for each of its "
                f"{group.num_candidates} candidates, got {len(group.scores)}"
            )
        if (group.mismatched_ids is None) != (groups[0].mismatched_ids is None):
            raise ValueError(
                "either every group of a batch has a mismatched completion or none, got rows "
                f"{groups[0].row_id!r} and {group.row_id!r}; call with_mismatched on all groups"
            )
