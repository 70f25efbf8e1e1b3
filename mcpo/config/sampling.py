"""How negatives are drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mcpo.config.options import option, require


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelConfig:
    """The MC kernel: how negatives are drawn from the pool."""

    strategy: Literal["mc", "max", "min", "random"] = option(
        "mc", "draw by softmax of the scores, take the best or worst scored, or draw uniformly"
    )
    score: Literal["log_ratio", "logp_scaled", "logp", "mean_logp", "external"] = option(
        "log_ratio", "beta*(logp-ref), beta*logp, logp, logp per token, or the scores of the rows"
    )
    num_negatives: int = option(1, "negatives drawn per prompt (M)")
    replacement: bool = option(False, "draw with replacement")
    temperature: float = option(1.0, "divides the scores before the softmax")
    sampling: Literal["dynamic", "static"] = option(
        "dynamic", "draw at every step, or once when the data is built and train on that alone"
    )
    chain: Literal["none", "subset", "metropolis"] = option(
        "none", "draw from the whole pool at once, or by a chain of small steps over it"
    )
    chain_steps: int = option(1, "steps of a chain, or proposals of a lazy one, at each draw")
    proposals_per_step: int = option(1, "candidates beside the state in a step of chain: subset")
    scoring: Literal["full", "lazy"] = option(
        "full", "score the whole pool at every step, or what a persistent chain asks for"
    )
    lazy_audit_steps: int = option(
        0, "steps between full scorings that a lazy chain is compared with; 0: none"
    )

    def __post_init__(self) -> None:
        for name in ("num_negatives", "chain_steps", "proposals_per_step"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1", getattr(self, name))
        require(self.temperature > 0, "temperature must be positive", self.temperature)
        require(
            self.lazy_audit_steps >= 0, "lazy_audit_steps must be 0 or more", self.lazy_audit_steps
        )
        self._check_chain()
        self._check_lazy()
        self._check_static()

    @property
    def runs_chains(self) -> bool:
        """Whether negatives are states of chains."""
        return self.chain != "none" or self.scoring == "lazy"

    def _check_chain(self) -> None:
        require(
            self.runs_chains or self.chain_steps == 1,
            "chain_steps above 1 needs chain: subset or metropolis, or scoring: lazy (a draw from "
            "the whole pool forgets its state, so more of them change nothing)",
            self.chain_steps,
        )
        require(
            self.chain == "subset" or self.proposals_per_step == 1,
            "proposals_per_step above 1 needs chain: subset",
            f"chain: {self.chain}",
        )
        if not self.runs_chains:
            return
        require(
            self.strategy == "mc",
            "a chain needs strategy: mc, the only one that draws by weights",
            self.strategy,
        )
        require(
            self.num_negatives == 1 or self.replacement,
            "several negatives from chains need replacement: true, for chains may meet; negatives",
            self.num_negatives,
        )

    def _check_lazy(self) -> None:
        if self.scoring == "full":
            require(
                self.lazy_audit_steps == 0,
                "lazy_audit_steps needs scoring: lazy",
                self.lazy_audit_steps,
            )
            return
        require(
            self.chain != "subset",
            "scoring: lazy is a metropolis chain and needs chain: none or metropolis",
            self.chain,
        )
        require(
            self.score != "external",
            "scoring: lazy needs a score that the policy changes; scores of the rows are known "
            "without a forward",
            self.score,
        )

    def _check_static(self) -> None:
        if self.sampling == "dynamic":
            return
        require(
            self.strategy == "random" or self.score == "external",
            "sampling: static draws before the policy has scored anything, and needs strategy: "
            "random, or score: external; strategy and score",
            (self.strategy, self.score),
        )
        require(not self.replacement, "sampling: static needs replacement: false", True)
        require(
            not self.runs_chains,
            "sampling: static draws once, and needs chain: none and scoring: full",
            (self.chain, self.scoring),
        )
