"""What every arm is given: groups, reference log-probabilities, and a draw.

MC-PO that draws one negative is DPO on the chosen candidate and the drawn one. So all arms compute
one number and one gradient: those that score a pool draw from it, and those that take pairs are
given the pair that is drawn. The reference is the model itself, off by a few nats at random, as
after some training; it is known beforehand on all sides.
"""
# P prompts, C candidates, S sequences

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.step.points import Point
from mcpo.config import Config, KernelConfig, LossConfig
from mcpo.data import load_rows
from mcpo.mc_kernel import Draw, candidate_scores, gumbel_noise, sample_negatives
from mcpo.pack import move, pack
from mcpo.policy import Policy, group_logps
from mcpo.records import PackedBatch, TokenizedGroup
from mcpo.reference_cache import ReferenceLogps
from mcpo.tokens import TokenConfig, tokenize

CONFIG = Config(
    kernel=KernelConfig(num_negatives=1), loss=LossConfig(loss_type=("mcpo",), beta=0.1)
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
# Of the reference, in nats.
SPREAD = 5.0
# By how much the drawn candidate's key exceeds the next: rounding of a score, a tenth of that of a
# log-probability, must not turn a draw.
LEAST_GAP = 0.5
MOST_STEPS = 10_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """Of one step."""

    groups: tuple[TokenizedGroup, ...]
    reference: dict[str, tuple[float, ...]]
    """Log-probabilities of each group's candidates, by row id."""
    step: int
    """Of training, which with the scores decides the draw."""
    drawn: tuple[int, ...]
    """Column of the negative of each group."""
    dtype: str

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """Of matrix products, where it is not that of the weights."""
        return torch.bfloat16 if self.dtype == "bf16" else None

    @property
    def references(self) -> ReferenceLogps:
        """As the trainer has them."""
        return ReferenceLogps(logps=self.reference)

    def pairs(self) -> Problem:
        """The same problem with nothing but the chosen and the drawn candidates."""
        keep = [(0, column) for column in self.drawn]
        groups = tuple(
            only(group, columns) for group, columns in zip(self.groups, keep, strict=True)
        )
        reference = {
            group.row_id: tuple(self.reference[group.row_id][column] for column in columns)
            for group, columns in zip(self.groups, keep, strict=True)
        }
        return Problem(
            groups=groups,
            reference=reference,
            step=self.step,
            drawn=(1,) * len(groups),
            dtype=self.dtype,
        )

    def visited(self) -> tuple[TokenizedGroup, ...]:
        """Of each group the chosen, the drawn and, where there is one, another candidate."""
        found: list[TokenizedGroup] = []
        for group, drawn in zip(self.groups, self.drawn, strict=True):
            others = [column for column in range(1, group.num_candidates) if column != drawn]
            found.append(group.only((0, *sorted([drawn, *others[:1]]))))
        return tuple(found)

    def draw(self, logp_PC: Tensor, batch: PackedBatch) -> Draw:
        """Stage 6, as the trainer calls it."""
        ref_logp_PC = self.references.of(batch)
        score_PC = candidate_scores(
            logp_PC.detach(),
            ref_logp_PC,
            batch.length_PC,
            score=CONFIG.kernel.score,
            beta=CONFIG.loss.beta,
        )
        noise_PMC = _noise(batch, self.step).to(batch.mask_PC.device)
        return sample_negatives(score_PC, batch.mask_PC, CONFIG.kernel, noise_PMC)

    def save(self, path: Path) -> None:
        """For a process of its own."""
        path.write_text(json.dumps(asdict(self)))


def only(group: TokenizedGroup, columns: tuple[int, ...]) -> TokenizedGroup:
    """A group with some of its candidates."""
    return TokenizedGroup(
        row_id=group.row_id,
        prompt_ids=group.prompt_ids,
        candidate_ids=tuple(group.candidate_ids[column] for column in columns),
    )


def restore(path: Path) -> Problem:
    """The inverse of ``Problem.save``."""
    fields: dict[str, Any] = json.loads(path.read_text())
    groups = tuple(
        TokenizedGroup(
            row_id=group["row_id"],
            prompt_ids=tuple(group["prompt_ids"]),
            candidate_ids=tuple(map(tuple, group["candidate_ids"])),
        )
        for group in fields.pop("groups")
    )
    reference = {name: tuple(values) for name, values in fields.pop("reference").items()}
    return Problem(groups=groups, reference=reference, drawn=tuple(fields.pop("drawn")), **fields)


def synthetic_groups(point: Point, vocabulary: int) -> tuple[TokenizedGroup, ...]:
    """Random tokens, all prompts and all candidates of one length."""
    draw = random.Random(0)

    def ids(count: int) -> tuple[int, ...]:
        # The first tokens of a vocabulary are special as a rule.
        return tuple(draw.choices(range(8, vocabulary), k=count))

    return tuple(
        TokenizedGroup(
            row_id=f"group-{number}",
            prompt_ids=ids(point.prompt),
            candidate_ids=tuple(ids(point.completion) for _ in range(1 + point.pool)),
        )
        for number in range(point.groups)
    )


def groups_of(
    path: Path, point: Point, tokenizer: PreTrainedTokenizerBase
) -> tuple[TokenizedGroup, ...]:
    """The first groups of a file, of any format the trainer reads; pools are cut to size.

    Raises:
        ValueError: the file holds fewer.
    """
    groups = tokenize(load_rows([str(path)]).rows, tokenizer, TokenConfig()).groups
    if len(groups) < point.groups:
        raise ValueError(f"--groups must be at most {len(groups)} for {path}, got {point.groups}")
    return tuple(
        only(group, tuple(range(min(group.num_candidates, 1 + point.pool))))
        for group in groups[: point.groups]
    )


def make(model: PreTrainedModel, groups: tuple[TokenizedGroup, ...], dtype: str) -> Problem:
    """Give groups a reference and choose a step whose draw does not hang on rounding.

    Args:
        model: in float32; changed, so a copy.
        groups: to be scored.
        dtype: the problem's.
    """
    policy = Policy(model, head_impl="auto", autocast_dtype=None)
    generator = torch.Generator().manual_seed(0)
    batch = pack(groups, share_prefix=True)
    placed = move(batch, model.device)
    with torch.no_grad():
        logp_PC = group_logps(policy(placed), placed).cpu()
    offset_PC = SPREAD * torch.randn(logp_PC.shape, generator=generator)
    reference = {
        group.row_id: tuple((logp_C + offset_C)[: group.num_candidates].tolist())
        for group, logp_C, offset_C in zip(groups, logp_PC, offset_PC, strict=True)
    }
    score_PC = CONFIG.loss.beta * (logp_PC - ReferenceLogps(logps=reference).of(batch))
    step = next(
        step for step in range(MOST_STEPS) if _least_gap(score_PC, batch, step) >= LEAST_GAP
    )
    undrawn = Problem(groups=groups, reference=reference, step=step, drawn=(), dtype=dtype)
    drawn = undrawn.draw(logp_PC, batch).negative_PM[:, 0].tolist()
    return Problem(groups=groups, reference=reference, step=step, drawn=tuple(drawn), dtype=dtype)


def _noise(batch: PackedBatch, step: int) -> Tensor:
    return gumbel_noise(
        CONFIG.run.seed,
        step,
        batch.row_ids,
        num_draws=1,
        num_candidates=batch.mask_PC.shape[1],
    )


def _least_gap(score_PC: Tensor, batch: PackedBatch, step: int) -> float:
    """Between the two largest keys of a pool, the least of all prompts."""
    key_PC = (score_PC.double() + _noise(batch, step)[:, 0]).masked_fill(~batch.mask_PC, -torch.inf)
    if key_PC.shape[1] < 3:
        return torch.inf
    best = key_PC[:, 1:].topk(2, dim=1).values
    return float((best[:, 0] - best[:, 1]).min())
