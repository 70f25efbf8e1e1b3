"""Stage 6, the MC kernel: draw hard negatives from the policy's own scores.

Algorithm 1 of the paper (arXiv 2502.04567): weights w = softmax(score) over the dispreferred pool,
the negative z ~ Categorical(w), redrawn at every step under the current policy, without gradient.
The chosen completion is not among the candidates of a draw.
"""

from mcpo.mc_kernel.draw import Draw as Draw
from mcpo.mc_kernel.draw import sample_negatives as sample_negatives
from mcpo.mc_kernel.lazy import LazyBatch as LazyBatch
from mcpo.mc_kernel.lazy import lazy_draw as lazy_draw
from mcpo.mc_kernel.noise import draws_needed as draws_needed
from mcpo.mc_kernel.noise import gumbel_noise as gumbel_noise
from mcpo.mc_kernel.scores import candidate_scores as candidate_scores
