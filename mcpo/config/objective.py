"""What is minimised."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from mcpo.config.options import option, require

# Here, without torch, so that a misspelt name answers at once; mcpo/losses/names.py has the losses.
LOSS_TYPES = (
    *("mcpo", "mcpo_unbiased", "rnce", "dpo", "rpo", "cdpo", "robust", "exo", "hinge"),
    *("ipo", "ipo_sum", "bco", "kto", "apo_zero", "apo_down", "sppo", "nca", "nca_rated"),
    *("infonca", "simpo", "cpo", "orpo", "sft"),
)
# Of those that contrast the chosen with all candidates, drawn or not.
POOL_LOSSES = ("infonca", "nca_rated")
SMOOTHED = ("cdpo", "robust", "exo", "simpo", "cpo")
# Of those that have another name in TRL and the same formula here.
TRL_NAMES = {"sigmoid": "dpo", "exo_pair": "exo", "nca_pair": "nca", "sppo_hard": "sppo"}


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """The objective."""

    loss_type: tuple[str, ...] = option(("mcpo",), f"one or several of {', '.join(LOSS_TYPES)}")
    loss_weights: tuple[float, ...] = option((), "of the losses of loss_type; none: 1 each")
    sft_weight: float = option(0.0, "weight of the chosen's NLL per token, added to the loss")
    augmented: bool = option(
        False, "contrast the chosen with its whole pool instead of the drawn negatives"
    )
    beta: float = option(0.1, "strength of the tie to the reference policy")
    label_smoothing: float = option(
        0.0, f"probability that a preference is wrong, for {', '.join(SMOOTHED)}"
    )
    rpo_alpha: float = option(1.0, "weight of the NLL in rpo")
    cpo_alpha: float = option(1.0, "weight of the NLL in cpo")
    simpo_gamma: float = option(0.5, "margin of simpo")
    rating_temperature: float = option(1.0, "divides the ratings in infonca and nca_rated")
    baseline_decay: float = option(
        0.9, "of the running means in bco and kto; 0: the last step's means"
    )

    def __post_init__(self) -> None:
        for name in self.loss_type:
            known = f" ({name} of TRL is {TRL_NAMES[name]} here)" if name in TRL_NAMES else ""
            rule = f"loss_type must be one of {', '.join(LOSS_TYPES)}{known}"
            require(name in LOSS_TYPES, rule, name)
        rule = "loss_type must name at least one loss, and none twice"
        require(0 < len(self.loss_type) == len(set(self.loss_type)), rule, self.loss_type)
        rule = f"loss_weights must hold one positive number for each of {self.loss_type}, or none"
        fits = len(self.loss_weights) in (0, len(self.loss_type))
        require(fits and all(0 < w < inf for w in self.loss_weights), rule, self.loss_weights)
        for name in ("sft_weight", "rpo_alpha", "cpo_alpha"):
            value = getattr(self, name)
            require(0 <= value < inf, f"{name} must be 0 or more", value)
        for name in ("beta", "rating_temperature"):
            require(0 < getattr(self, name) < inf, f"{name} must be positive", getattr(self, name))
        rule = "baseline_decay must be in [0, 1)"
        require(0 <= self.baseline_decay < 1, rule, self.baseline_decay)
        self._check_smoothing()
        rule = "the NLL is either sft of loss_type or sft_weight: give one"
        require("sft" not in self.loss_type or not self.sft_weight, rule, self.sft_weight)

    def _check_smoothing(self) -> None:
        smoothing = self.label_smoothing
        require(0 <= smoothing < 0.5, "label_smoothing must be in [0, 0.5)", smoothing)
        rule = "exo needs label_smoothing above 0 (its authors take 1e-3)"
        require("exo" not in self.loss_type or smoothing > 0, rule, smoothing)
        rule = f"label_smoothing is of {', '.join(SMOOTHED)} (dpo with it is cdpo); leave it at 0"
        smoothed = not set(SMOOTHED).isdisjoint(self.loss_type)
        require(smoothed or smoothing == 0, f"{rule} for {', '.join(self.loss_type)}", smoothing)

    @property
    def weighted(self) -> tuple[tuple[str, float], ...]:
        """Each loss with its weight, the NLL of ``sft_weight`` last."""
        weights = self.loss_weights or (1.0,) * len(self.loss_type)
        nll = (("sft", self.sft_weight),) if self.sft_weight else ()
        return (*zip(self.loss_type, weights, strict=True), *nll)
