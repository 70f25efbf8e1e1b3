"""The running means that ``bco`` and ``kto`` judge rewards against.

They are means over the prompts of whole steps, on all ranks, and those of a step hold from the next
one on: so they depend neither on how a step is cut into micro-batches nor on its own rewards. They
begin at 0, which they are before the first update, where policy and reference are one.

TRL differs. Its ``kto`` estimates z0 from the mismatched pairs of the very micro-batch it is
applied to, and clamps each estimate at 0; here the running mean is clamped. Its ``bco_pair`` has
no delta.
"""

from __future__ import annotations

from collections.abc import Mapping

from mcpo.records import Baselines


class RunningBaselines:
    """Exponential means of rewards over steps: state of a run, saved with its checkpoints."""

    def __init__(self) -> None:
        self._delta = 0.0
        self._mismatched = 0.0

    @property
    def values(self) -> Baselines:
        """Those that hold in the next step."""
        return Baselines(delta=self._delta, z0=max(0.0, self._mismatched))

    def update(self, metrics: Mapping[str, float], decay: float) -> None:
        """Take in the means of a step, each by 1 - ``decay``."""
        rewarded = (metrics["rewards/chosen"] + metrics["rewards/rejected"]) / 2
        self._delta = decay * self._delta + (1 - decay) * rewarded
        mismatched = metrics.get("kto/mismatched", 0.0)
        self._mismatched = decay * self._mismatched + (1 - decay) * mismatched

    def state_dict(self) -> dict[str, float]:
        """Both means."""
        return {"delta": self._delta, "mismatched": self._mismatched}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Continue from ``state_dict``."""
        self._delta, self._mismatched = state["delta"], state["mismatched"]
