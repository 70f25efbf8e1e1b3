"""Losses that know no reference: of log-probabilities alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mcpo.config import LossConfig
from mcpo.losses.negatives import contrasted, mean_logps, mean_over_negatives
from mcpo.records import ScoredBatch


def sft(batch: ScoredBatch, config: LossConfig) -> Tensor:
    """[P] -logp_0 / (mean length of the chosen in the step): the NLL of the chosen.

    The mean over the prompts of a step is the mean over its chosen tokens, so that every token
    counts alike, however the step is cut. TRL's ``sft`` takes that mean over a micro-batch.

    Raises:
        ValueError: the batch does not know the mean length.
    """
    del config
    if batch.mean_chosen_length is None:
        raise ValueError(
            "an NLL term needs the mean length of the chosen completions of the whole step, got "
            "None; set chosen_tokens of StepWork, or mean_chosen_length of ScoredBatch"
        )
    return -batch.logp_PC[:, 0] / batch.mean_chosen_length


def simpo(batch: ScoredBatch, config: LossConfig) -> Tensor:
    """[P] -(1 - e) log sigma(d) - e log sigma(-d), e = label_smoothing.

    d = beta * (logp_0 / |y_0| - logp_z / |y_z|) - simpo_gamma. Meng et al. 2024, arXiv 2405.14734.
    TRL: ``simpo`` of its CPO trainer with cpo_alpha = 0.
    """
    chosen_P1, negative_PM = contrasted(mean_logps(batch), batch)
    margin_PM = config.beta * (chosen_P1 - negative_PM) - config.simpo_gamma
    return mean_over_negatives(_smoothed(margin_PM, config.label_smoothing), batch)


def cpo(batch: ScoredBatch, config: LossConfig) -> Tensor:
    """[P] -(1 - e) log sigma(d) - e log sigma(-d) + cpo_alpha * NLL, e = label_smoothing.

    d = beta * (logp_0 - logp_z), the NLL as in ``sft``. Xu et al. 2024, arXiv 2401.08417. TRL:
    ``sigmoid`` of its CPO trainer.
    """
    chosen_P1, negative_PM = contrasted(batch.logp_PC, batch)
    loss_PM = _smoothed(config.beta * (chosen_P1 - negative_PM), config.label_smoothing)
    return mean_over_negatives(loss_PM, batch) + config.cpo_alpha * sft(batch, config)


def orpo(batch: ScoredBatch, config: LossConfig) -> Tensor:
    """[P] NLL - beta * log sigma(o_0 - o_z), o = log( p / (1 - p) ), p = exp(logp / |y|).

    The log odds of a completion by the geometric mean of its tokens' probabilities; beta is the
    paper's lambda. Hong et al. 2024, arXiv 2403.07691, equations 4 and 7. TRL's ORPO trainer takes
    the NLL of prompt and chosen completion; here it is that of the completion, as in ``sft``.
    """
    chosen_P1, negative_PM = contrasted(_log_odds(mean_logps(batch)), batch)
    ratio_PM = F.logsigmoid(chosen_P1 - negative_PM)
    return sft(batch, config) - config.beta * mean_over_negatives(ratio_PM, batch)


def _smoothed(margin_PM: Tensor, smoothing: float) -> Tensor:
    right_PM, wrong_PM = -F.logsigmoid(margin_PM), -F.logsigmoid(-margin_PM)
    return (1 - smoothing) * right_PM + smoothing * wrong_PM


def _log_odds(logp: Tensor) -> Tensor:
    """log p - log(1 - p), of log p."""
    # A probability of 1 has infinite odds. The nearest one that the dtype tells from it has not.
    logp = logp.clamp(max=-torch.finfo(logp.dtype).eps)
    return logp - torch.log(-torch.expm1(logp))
