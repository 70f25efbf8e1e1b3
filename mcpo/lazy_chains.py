"""``scoring: lazy``: where each prompt's chains stand, and the last known score of every candidate.

This is state that the draws of later steps depend on. Every rank holds all of it: after each step
the ranks exchange what they learnt of their rows, so it does not matter which of them meets a
prompt next, and a checkpoint of the first rank is one of all.
"""
# G groups, F candidates of the largest group, P prompts, C packed candidates, M chains

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mcpo.config import Config, KernelConfig
from mcpo.engine import Engine
from mcpo.mc_kernel import LazyBatch, candidate_scores, draws_needed, gumbel_noise
from mcpo.mc_kernel.lazy import propose
from mcpo.mc_kernel.noise import BEFORE_STEPS
from mcpo.records import PackedBatch, TokenizedGroup
from mcpo.reference import Reference
from mcpo.reference_cache import ReferenceLogps


class LazyChains:
    """The chains of a run, as they are before its first step.

    What is known at first is the reference's score, under the reference; the chains begin in a draw
    by it.

    Args:
        groups: trained on.
        reference: of these groups.
        config: of the run.

    Raises:
        ValueError: the score begins with log-probabilities, and the reference has none beforehand.
    """

    def __init__(
        self, groups: Sequence[TokenizedGroup], reference: Reference, config: Config
    ) -> None:
        self._kernel, self._seed = config.kernel, config.run.seed
        self._place = {group.row_id: number for number, group in enumerate(groups)}
        size_G = torch.tensor([group.num_candidates for group in groups])
        self._in_pool_GF = torch.arange(int(size_G.max())) < size_G[:, None]
        self._in_pool_GF[:, 0] = False
        self._known_GF = torch.zeros(self._in_pool_GF.shape, dtype=torch.float64)
        # The reference's ratio to itself is 1, whatever its log-probabilities are.
        if config.kernel.score != "log_ratio":
            for number, group in enumerate(groups):
                first_C = _first_scores(group, reference, config)
                self._known_GF[number, 1 : group.num_candidates] = first_C[1:]
        self._seen_GF = torch.full(self._known_GF.shape, BEFORE_STEPS)
        self._state_GM = self._first_states(list(self._place))
        self._noted: dict[int, Tensor] = {}

    def _first_states(self, row_ids: Sequence[str]) -> Tensor:
        noise_GMF = gumbel_noise(
            self._seed,
            BEFORE_STEPS,
            row_ids,
            num_draws=self._kernel.num_negatives,
            num_candidates=self._known_GF.shape[1],
        )
        logit_GF = (self._known_GF / self._kernel.temperature).masked_fill(
            ~self._in_pool_GF, -torch.inf
        )
        return (logit_GF[:, None] + noise_GMF).argmax(dim=2)

    def reduced(self, groups: Sequence[TokenizedGroup], step: int) -> list[TokenizedGroup]:
        """Of each group the chosen one, the states of its chains and what they are offered."""
        lazy = self.at(groups, step, torch.device("cpu"))
        wanted = torch.cat([lazy.state_PM, lazy.proposal_PMK.flatten(1)], dim=1).tolist()
        return [
            group.only((0, *sorted(set(columns))))
            for group, columns in zip(groups, wanted, strict=True)
        ]

    def at(self, groups: Sequence[TokenizedGroup], step: int, device: torch.device) -> LazyBatch:
        """What the chains bring to a pack of these groups, whole or ``reduced``, in a step.

        Proposals are a function of what is known and of (seed, step, row id).
        """
        row_P = torch.tensor([self._place[group.row_id] for group in groups])
        known_PF, in_pool_PF = self._known_GF[row_P], self._in_pool_GF[row_P]
        noise_PDF = gumbel_noise(
            self._seed,
            step,
            [group.row_id for group in groups],
            num_draws=draws_needed(self._kernel),
            num_candidates=known_PF.shape[1],
        )
        proposal_PMK, log_u_PMK = propose(known_PF, in_pool_PF, self._kernel, noise_PDF)
        column_PC = torch.zeros(len(groups), max(g.num_candidates for g in groups)).long()
        for column_C, group in zip(column_PC, groups, strict=True):
            columns = group.columns or range(group.num_candidates)
            column_C[: group.num_candidates] = torch.tensor(list(columns))
        return LazyBatch(
            known_PF=known_PF,
            in_pool_PF=in_pool_PF,
            age_PF=step - self._seen_GF[row_P],
            column_PC=column_PC,
            state_PM=self._state_GM[row_P],
            proposal_PMK=proposal_PMK,
            log_u_PMK=log_u_PMK,
        ).to(device)

    def note(self, batch: PackedBatch, score_PC: Tensor, state_PM: Tensor) -> None:
        """Keep until ``agree`` the scores of a batch, and where its chains stand now."""
        num_F = self._known_GF.shape[1]
        for row_id, columns, scores, states in zip(
            batch.row_ids, batch.columns, score_PC.tolist(), state_PM.tolist(), strict=True
        ):
            number = self._place[row_id]
            if number not in self._noted:
                width = 2 * num_F + self._kernel.num_negatives
                self._noted[number] = torch.zeros(width, dtype=torch.float64)
            noted = self._noted[number]
            # Of the chosen one, column 0, nothing is kept.
            for column, score in list(zip(columns, scores, strict=False))[1:]:
                noted[column], noted[num_F + column] = score, 1.0
            noted[2 * num_F :] = torch.tensor(states)

    def agree(self, engine: Engine, rows: Sequence[int], step: int) -> None:
        """Exchange what the ranks noted in a step whose groups are ``rows``; one collective."""
        num_F = self._known_GF.shape[1]
        width = 2 * num_F + self._kernel.num_negatives
        noted = torch.zeros(len(rows), width, dtype=torch.float64)
        for place, number in enumerate(rows):
            if number in self._noted:
                noted[place] = self._noted[number]
        self._noted = {}
        # A row is one rank's; the sum adds zeros to it.
        noted = engine.sum(noted.to(engine.device)).cpu()
        row_P = torch.tensor(rows)
        fresh_PF = noted[:, num_F : 2 * num_F] > 0
        self._known_GF[row_P] = noted[:, :num_F].where(fresh_PF, self._known_GF[row_P])
        self._seen_GF[row_P] = self._seen_GF[row_P].masked_fill(fresh_PF, step)
        state_PM = noted[:, 2 * num_F :].long()
        # No chain stands in the chosen one: 0 is a row that nobody met.
        self._state_GM[row_P] = state_PM.where(state_PM > 0, self._state_GM[row_P])

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint holds."""
        return {"known": self._known_GF, "seen": self._seen_GF, "state": self._state_GM}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on where a checkpoint stands.

        Raises:
            ValueError: it is of other groups or of another number of chains.
        """
        for name, own in self.state_dict().items():
            if state[name].shape != own.shape:
                raise ValueError(
                    f"the chains of a checkpoint must be those of this run: {name} must have shape "
                    f"{tuple(own.shape)}, got {tuple(state[name].shape)}; resume with its data"
                )
            own.copy_(state[name])


def _first_scores(group: TokenizedGroup, reference: Reference, config: Config) -> Tensor:
    """[C] float64 scores of the reference."""
    score = config.kernel.score
    if not isinstance(reference, ReferenceLogps):
        raise ValueError(
            f"scoring: lazy with score: {score} begins with log-probabilities of the reference "
            "that are known before training; set reference: precomputed, or score: log_ratio"
        )
    # A mismatched completion, if there is one, comes last.
    known = reference.logps[group.row_id][: group.num_candidates]
    logp_C = torch.tensor(known, dtype=torch.float64)
    length_C = torch.tensor([len(ids) for ids in group.candidate_ids])
    return candidate_scores(logp_C, logp_C, length_C, score=score, beta=config.loss.beta)


def largest_visit(group: TokenizedGroup, kernel: KernelConfig) -> TokenizedGroup:
    """The largest group that a step may pack in the place of ``group``; itself if all is scored."""
    if kernel.scoring == "full":
        return group
    most = most_visited(kernel)
    longest = sorted(
        range(1, group.num_candidates), key=lambda column: -len(group.candidate_ids[column])
    )
    return group.only((0, *sorted(longest[:most])))


def most_visited(kernel: KernelConfig) -> int:
    """Candidates besides the chosen one that a lazy step packs at most."""
    return kernel.num_negatives * (1 + kernel.chain_steps)
