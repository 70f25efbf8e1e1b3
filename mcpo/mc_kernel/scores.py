"""What a draw weighs: one score for each candidate."""

from __future__ import annotations

from torch import Tensor


def candidate_scores(
    logp_PC: Tensor,
    ref_logp_PC: Tensor,
    length_PC: Tensor,
    *,
    score: str,
    beta: float,
    external_PC: Tensor | None = None,
) -> Tensor:
    """[P, C] the score that a strategy weighs; ``log_ratio`` is the paper's secret reward beta*rho.

    The paper's wording admits the first four readings: ``log_ratio`` is uniform at step 0, ``logp``
    is dominated by length. ``external`` are the scores that came with the rows: with temperature
    1 / gamma the draws of HPS (arXiv 2502.14400), in proportion to exp(gamma * reward).
    """
    match score:
        case "log_ratio":
            return beta * (logp_PC - ref_logp_PC)
        case "logp_scaled":
            return beta * logp_PC
        case "logp":
            return logp_PC
        case "mean_logp":
            return logp_PC / length_PC
        case "external" if external_PC is not None:
            return external_PC
        case "external":
            raise ValueError("score: external needs the scores of the rows, got none")
        case _:
            raise ValueError(
                f"score must be log_ratio, logp_scaled, logp, mean_logp or external, got {score!r}"
            )
