"""What a run is told: frozen dataclasses, one per concern, under the names Hugging Face users know.

A YAML file holds the same names, flat; the command line overrides it (mcpo/cli.py). This package
imports neither torch nor transformers, so that ``--help`` is instant.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from mcpo.config.data import DataConfig
from mcpo.config.model import AdapterConfig, ModelConfig, ReferenceConfig, ScaleConfig
from mcpo.config.objective import LOSS_TYPES, POOL_LOSSES, SMOOTHED, LossConfig
from mcpo.config.options import help_of, require
from mcpo.config.sampling import KernelConfig
from mcpo.config.training import OptimConfig, RunConfig

__all__ = [
    "LOSS_TYPES",
    "POOL_LOSSES",
    "SMOOTHED",
    "AdapterConfig",
    "Config",
    "DataConfig",
    "KernelConfig",
    "LossConfig",
    "ModelConfig",
    "OptimConfig",
    "ReferenceConfig",
    "RunConfig",
    "ScaleConfig",
    "help_of",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Everything a run is told."""

    model: ModelConfig = field(default_factory=ModelConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    scale: ScaleConfig = field(default_factory=ScaleConfig)
    data: DataConfig = field(default_factory=DataConfig)
    kernel: KernelConfig = field(default_factory=KernelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        kernel, losses = self.kernel, self.loss.loss_type
        if "rnce" in losses:
            rule = "rnce is the listwise loss of negatives drawn uniformly (for others it is mcpo)"
            require(kernel.strategy == "random", f"{rule}: strategy must be random", kernel)
        if "mcpo_unbiased" in losses:
            rule = (
                "mcpo_unbiased is unbiased for one way to draw: strategy mc, score log_ratio, "
                "temperature 1, chain none, scoring full, with several negatives replacement, and "
                "not augmented"
            )
            drawn = (kernel.strategy, kernel.score, kernel.temperature) == ("mc", "log_ratio", 1.0)
            apart = kernel.num_negatives == 1 or kernel.replacement
            at_once = not kernel.runs_chains
            require(drawn and apart and at_once and not self.loss.augmented, rule, kernel)
        if kernel.scoring == "lazy":
            whole = [name for name in losses if name in POOL_LOSSES]
            whole += ["augmented"] * self.loss.augmented
            rule = "scoring: lazy needs losses of drawn negatives, since it scores no whole pool"
            require(not whole, rule, whole)
