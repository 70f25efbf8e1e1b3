"""The nouns of MC-PO, in the order the data meets them.

Shapes: T packed tokens, N scored tokens, D hidden, V vocabulary, S sequences (one per candidate),
P prompts, C candidates per prompt (the largest pool of the batch plus the chosen one), M negatives.
Candidate 0 is always the chosen one; candidates 1.. are the dispreferred pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    from torch import Tensor

    from mcpo_kernels.prefix_attention.layout import PrefixLayout


class Message(TypedDict):
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One completion of a prompt with what is known of its quality."""

    text: str
    rank: float | None = None
    """1 is best."""
    score: float | None = None
    """Larger is better."""
    model: str | None = None
    """Who wrote it."""
    finished: bool = True
    """False for a text cut at a length limit, which therefore does not end with EOS."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CandidateRow:
    """A prompt, its chosen completion and the pool of dispreferred ones, as text."""

    row_id: str
    """Unique within a run: draws, caches and error messages name rows by it."""
    prompt: str | tuple[Message, ...]
    """Plain text, or the conversation so far, ending with the user's turn."""
    chosen: Candidate
    pool: tuple[Candidate, ...]
    """At least one."""

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        """The chosen completion first, then the pool."""
        return (self.chosen, *self.pool)


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizedGroup:
    """A prompt and its candidates in token space, each ending with EOS unless truncated."""

    row_id: str
    prompt_ids: tuple[int, ...]
    candidate_ids: tuple[tuple[int, ...], ...]
    """Completion tokens only; candidate 0 is the chosen one; none is empty."""
    scores: tuple[float | None, ...] = ()
    """What the row says of each candidate, larger is better; () where it says nothing at all."""
    columns: tuple[int, ...] = ()
    """Which candidates of the row these are, where they are not all; () where they are."""
    mismatched_ids: tuple[int, ...] | None = None
    """A completion of another prompt, scored along for ``kto``; no candidate, never drawn."""

    @property
    def num_candidates(self) -> int:
        """The chosen completion and its pool."""
        return len(self.candidate_ids)

    @property
    def scored_ids(self) -> tuple[tuple[int, ...], ...]:
        """Every completion that is scored: the candidates, then the mismatched one if any."""
        if self.mismatched_ids is None:
            return self.candidate_ids
        return (*self.candidate_ids, self.mismatched_ids)

    def only(self, columns: Sequence[int]) -> TokenizedGroup:
        """The same row with some of its candidates; column 0 must come first."""
        return replace(
            self,
            candidate_ids=tuple(self.candidate_ids[column] for column in columns),
            scores=tuple(self.scores[column] for column in columns) if self.scores else (),
            columns=tuple(columns),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedBatch:
    """P prompts with their candidates, laid end to end without padding.

    The last token of a candidate predicts nothing, so it is a target only and no input. The last
    prompt token predicts the first token of every candidate of its prompt, so its row is scored
    several times.
    """

    row_ids: tuple[str, ...]
    token_T: Tensor
    """[T] int64."""
    position_T: Tensor
    """[T] int64; every candidate restarts at the length of its prompt."""
    layout: PrefixLayout
    """Which tokens attend to which."""
    scored_N: Tensor
    """[N] int64, indices into token_T whose *next* token is a completion token."""
    target_N: Tensor
    """[N] int64, that next token."""
    seq_of_N: Tensor
    """[N] int64, the sequence it belongs to, non-decreasing in [0, S)."""
    num_seqs: int
    """S."""
    segment_of_S: tuple[int, ...]
    """[S] the segment of ``layout`` that holds the tokens of each sequence, known on the host."""
    seq_of_PC: Tensor
    """[P, C] int64, the sequence of each candidate; 0 where ``mask_PC`` is False."""
    mask_PC: Tensor
    """[P, C] bool, False where a prompt has fewer than C candidates."""
    length_PC: Tensor
    """[P, C] int64, completion tokens of each candidate; 1 where ``mask_PC`` is False."""
    external_score_PC: Tensor
    """[P, C] float64, the scores of the rows; NaN where a row has none."""
    columns: tuple[tuple[int, ...], ...]
    """Of each prompt the candidates that these are, in its row."""
    mismatched_P: Tensor | None = None
    """[P] int64, the sequence of each prompt's mismatched completion; None unless all have one."""

    @property
    def num_prompts(self) -> int:
        """P."""
        return len(self.row_ids)


@dataclass(frozen=True, kw_only=True, slots=True)
class Baselines:
    """Rewards that others are judged against: means over earlier steps, without gradient."""

    delta: float = 0.0
    """Of ``bco``: the mean reward of chosen and rejected completions."""
    z0: float = 0.0
    """Of ``kto``: the mean reward of mismatched completions, at least 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredBatch:
    """What a loss sees: log-probabilities of every candidate and the negatives the MC kernel drew.

    Entries where ``mask_PC`` is False hold 0 in both log-probabilities.
    """

    logp_PC: Tensor
    """[P, C] summed log-probabilities under the policy, differentiable."""
    ref_logp_PC: Tensor
    """[P, C] the same under the frozen reference."""
    length_PC: Tensor
    """[P, C] completion tokens."""
    mask_PC: Tensor
    """[P, C] bool."""
    negative_PM: Tensor
    """[P, M] int64 in [1, C), columns drawn from the pool."""
    negative_mask_PM: Tensor
    """[P, M] bool, False where the pool was too small for another draw without replacement."""
    mean_chosen_length: float | None = None
    """Completion tokens of the chosen over the whole step, divided by its prompts; a sum of logp of
    the chosen divided by it is, in the mean over prompts, the mean over tokens."""
    rating_PC: Tensor | None = None
    """[P, C] as in the batch."""
    baselines: Baselines = field(default_factory=Baselines)
    """Those that hold in this step."""
