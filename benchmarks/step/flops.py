"""Floating-point operations of a step, counted from its tokens.

    body       2 * parameters of the layers' matrices, for each token: forward 1, again 1,
               backward 2
    attention  4 * width of queries, for each pair of a token and one it attends to, and each
               layer: forward 1, again 1, backward 2.5, because it makes the weights once more
    head       2 * hidden size * vocabulary, for each scored row: forward 1, and where the row has
               a gradient 3, because the logits are made once more, or 2 if they are kept

"Again" is what the backward recomputes. Elementwise work, norms and embeddings are not counted: a
step that has little else costs more than this says. Padding is counted, as it is multiplied.
"""
# P prompts

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PretrainedConfig, PreTrainedModel

from benchmarks.step.arms import Arm
from benchmarks.step.problem import Problem
from mcpo.pack import packed_length
from mcpo.policy import logits_mb
from mcpo.records import TokenizedGroup


@dataclass(frozen=True, kw_only=True, slots=True)
class Costs:
    """Operations for one token, pair or row."""

    token: float
    pair: float
    row: float
    vocabulary: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> Costs:
        """Of a Llama-like model."""
        text: PretrainedConfig = model.config.get_text_config()
        width = text.num_attention_heads * (
            getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        )
        layers = [
            parameter.numel()
            for name, parameter in model.named_parameters()
            if ".layers." in name and parameter.dim() == 2
        ]
        return cls(
            token=2.0 * sum(layers),
            pair=4.0 * width * text.num_hidden_layers,
            row=2.0 * text.hidden_size * text.vocab_size,
            vocabulary=text.vocab_size,
        )


@dataclass(frozen=True, slots=True)
class Work:
    """Tokens, and the pairs that attend."""

    tokens: int
    pairs: int

    def __add__(self, other: Work) -> Work:
        """Both."""
        return Work(self.tokens + other.tokens, self.pairs + other.pairs)


NOTHING = Work(0, 0)
PACKED = ("packed", "lazy")


def count(arm: Arm, recompute: str, problem: Problem, costs: Costs) -> float:
    """Operations of one step of an arm.

    Args:
        arm: whose ``kind`` says what is computed.
        recompute: what its backward computes again.
        problem: with the whole pool.
        costs: of the model.
    """
    pairs = problem.pairs().groups
    trained_rows = _rows(pairs)
    if arm.kind in PACKED:
        groups = _packed_groups(arm, problem)
        forward, rows = _shared(groups), _rows(groups)
        # Of every mode but these two the backward sees the rows with gradient alone.
        backward = forward if recompute in ("none", "full") else _shared(pairs)
    else:
        forward = backward = _padded(pairs)
        # On a CPU TRL scores every position but the last.
        rows = forward.tokens - 2 * len(pairs) if arm.is_trl else trained_rows
        trained_rows = rows
        if arm.kind == "naive":
            forward, rows = forward + _padded(problem.groups), rows + _rows(problem.groups)
    again = {
        "none": NOTHING,
        # The results of products and, on the CPU, of attention are kept.
        "light": NOTHING,
        "selective": backward,
        "full": backward,
    }[recompute]
    logits = (rows if arm.kind in PACKED else trained_rows) * costs.vocabulary
    return (
        costs.token * (forward.tokens + again.tokens + 2 * backward.tokens)
        + costs.pair * (forward.pairs + again.pairs + 2.5 * backward.pairs)
        + costs.row * (rows + (3 - _kept(arm, recompute, logits)) * trained_rows)
    )


def _kept(arm: Arm, recompute: str, logits: int) -> float:
    """Share of the logits that the backward finds."""
    if arm.is_trl:
        return float(arm.kind == "trl_stored")
    # Padded steps keep as much as the packed ones that keep as much of their layers.
    mode = "light" if arm.kind not in PACKED and recompute == "none" else recompute
    return min(1.0, logits_mb(mode) * 2**20 / (4 * logits))


def packed_tokens(arm: Arm, problem: Problem) -> int:
    """Tokens that go through the body in all forwards of a step, padding included."""
    pairs = problem.pairs().groups
    if arm.kind in PACKED:
        return _shared(_packed_groups(arm, problem)).tokens
    scored = _padded(problem.groups).tokens if arm.kind == "naive" else 0
    return _padded(pairs).tokens + scored


def _packed_groups(arm: Arm, problem: Problem) -> tuple[TokenizedGroup, ...]:
    """What an arm of ours packs."""
    if arm.kind == "lazy":
        return problem.visited()
    return problem.pairs().groups if arm.pairs else problem.groups


def _shared(groups: Sequence[TokenizedGroup]) -> Work:
    pairs = 0
    for group in groups:
        prompt = len(group.prompt_ids)
        own = [len(ids) - 1 for ids in group.candidate_ids]
        pairs += _causal(prompt) + sum(prompt * count + _causal(count) for count in own)
    return Work(sum(packed_length(group, True) for group in groups), pairs)


def _padded(groups: Sequence[TokenizedGroup]) -> Work:
    width = max(len(group.prompt_ids) + len(ids) for group in groups for ids in group.candidate_ids)
    rows = sum(group.num_candidates for group in groups)
    return Work(rows * width, rows * _causal(width))


def _causal(length: int) -> int:
    return length * (length + 1) // 2


def _rows(groups: Sequence[TokenizedGroup]) -> int:
    return sum(len(ids) for group in groups for ids in group.candidate_ids)
