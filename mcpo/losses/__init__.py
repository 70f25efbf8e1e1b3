"""Stage 7, the losses: pure functions of log-probabilities, one value per prompt.

Notation of docs/math.md: rho = logp - ref_logp (summed over completion tokens), reward r = beta *
rho, sigma the logistic function; index 0 is the chosen completion, z a negative. A loss returns
[P]; the step divides the sum by the number of prompts of the whole optimizer step, whatever the
batch size, accumulation or world size. What a pair of completions has a loss of its own for is
averaged over the negatives of a prompt, of which each prompt may have another number.
"""

from mcpo.losses.listwise import mcpo
from mcpo.losses.names import (
    LOSSES,
    Loss,
    Term,
    loss_named,
    needs_reference,
    reaches_pool,
    terms_of,
)
from mcpo.losses.negatives import over_pool, rewards
from mcpo.losses.pairwise import dpo

__all__ = [
    "LOSSES",
    "Loss",
    "Term",
    "dpo",
    "loss_named",
    "mcpo",
    "needs_reference",
    "over_pool",
    "reaches_pool",
    "rewards",
    "terms_of",
]
