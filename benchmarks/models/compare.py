"""One model type: what becomes of it, and how far its log-probabilities are from its own.

Policy and checks are the trainer's. A class counts as served if the packed log-probabilities of
every candidate equal those of a plain forward of its own, in float32 within the band of
docs/numerics.md and in float64 within the same band at float64's precision.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.models.double import float64_throughout
from benchmarks.models.small import SPAN, VOCAB, small_config
from mcpo.pack import pack
from mcpo.policy import Policy
from mcpo.records import TokenizedGroup
from mcpo.self_check import FLOAT32_UNITS, check_packing
from mcpo_kernels.integrations.packable import probe
from mcpo_kernels.prefix_attention.mask import UnpackableError

# A prompt and candidates beyond every span of the small models, ragged, one without an input.
PROMPT, CANDIDATES = 37, (13, 29, 2 * SPAN, 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What becomes of a model type."""

    model_type: str
    model_class: str
    outcome: str
    """``served``, ``plain`` (one sequence per row), ``refused``, or ``not built``."""
    reason: str = ""
    """Why it is not packed, or not built; of what was left out if it is served."""
    stage: str = ""
    """What refused it: declared, probe, self-check, head."""
    layer_types: tuple[str, ...] = ()
    float32_error: float | None = None
    """Largest over candidates, in bands of float32."""
    float64_error: float | None = None
    """Largest over candidates, in nats."""
    gradient_error: float | None = None
    """Largest difference of an entry in float64, over the largest entry of any gradient."""


def examine(model_type: str) -> Verdict:
    """Build it, ask the checks, and measure what they let through."""
    try:
        model = build(model_type)
        kinds = getattr(model.config.get_text_config(), "layer_types", None) or ()
        found: dict[str, Any] = {"model_class": type(model).__name__}
        found["layer_types"] = tuple(dict.fromkeys(kinds))
        model(input_ids=torch.arange(3, 3 + PROMPT)[None], use_cache=False)
    # Whatever keeps a small one from being built here: sizes, an absent package.
    except Exception as error:
        reason = _first_line(error)
        return Verdict(model_type=model_type, model_class="", outcome="not built", reason=reason)
    stage, reason = refusal(model)
    if reason is None:
        return Verdict(model_type=model_type, outcome="served", **found, **measure(model_type))
    model = build(model_type)
    packless = refusal(model, packs=False)[1]
    if packless is None:
        return Verdict(model_type=model_type, outcome="plain", stage=stage, reason=reason, **found)
    # What speaks against plain forwards is why it is refused: packed ones are no more than faster.
    return Verdict(model_type=model_type, outcome="refused", stage="head", reason=packless, **found)


def build(model_type: str) -> PreTrainedModel:
    """Random weights, large enough that probabilities are far from uniform."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        small_config(model_type), dtype=torch.float32, experts_implementation="eager"
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.08)
            else:
                parameter.add_(torch.randn_like(parameter) / 10)
    return model.eval()


def refusal(model: PreTrainedModel, *, packs: bool = True) -> tuple[str, str | None]:
    """Which check of the trainer refuses the model, and why."""
    stage = "declared"
    try:
        policy = Policy(model, head_impl="auto", autocast_dtype=None, packs=packs)
        stage = "probe"
        if packs:
            probe(model)
        stage = "self-check"
        check_packing(policy, [group()], share_prefix=packs)
    except (UnpackableError, ValueError) as error:
        return stage, _first_line(error)
    # A model without code for several rows, or without hidden states to score.
    except Exception as error:
        return stage, f"{type(error).__name__}: {_first_line(error)}"
    return "", None


def measure(model_type: str) -> dict[str, Any]:
    """Errors of packed against plain, of values and gradients."""
    model = build(model_type)
    with torch.no_grad():
        plain_S = plain(model)
        policy = Policy(model, head_impl="auto", autocast_dtype=None)
        error_S = (policy(pack([group()], share_prefix=True)).double() - plain_S).abs()
    band_S = band(plain_S, torch.float32)
    found: dict[str, Any] = {"float32_error": float((error_S / band_S).max())}
    try:
        with float64_throughout():
            found |= _in_float64(build(model_type).double())
    # The model has code that float64 cannot run.
    except (RuntimeError, TypeError, NotImplementedError) as error:
        found["reason"] = f"not measured in float64: {_first_line(error)}"
    return found


def _in_float64(model: PreTrainedModel) -> dict[str, Any]:
    weight_S = torch.linspace(-1, 1, len(CANDIDATES), dtype=torch.float64)
    plain_S = plain(model)
    (plain_S * weight_S).sum().backward()
    wanted = _gradients(model)
    model.zero_grad()
    policy = Policy(model, head_impl="auto", autocast_dtype=None)
    packed_S = policy(pack([group()], share_prefix=True))
    (packed_S * weight_S).sum().backward()
    ours = _gradients(model)
    assert ours.keys() == wanted.keys()
    largest = max(float(gradient.abs().max()) for gradient in wanted.values())
    worst = max(float((ours[name] - wanted[name]).abs().max()) for name in wanted)
    return {
        "float64_error": float((packed_S - plain_S).detach().abs().max()),
        "gradient_error": worst / largest,
    }


def plain(model: PreTrainedModel) -> Tensor:
    """[S] log-probabilities by the model's own forwards, one candidate at a time."""
    only = group()
    logps: list[Tensor] = []
    for ids in only.candidate_ids:
        token_T = torch.tensor([*only.prompt_ids, *ids])
        logit_TV = model(input_ids=token_T[None], use_cache=False).logits[0]
        logp_LV = logit_TV[len(only.prompt_ids) - 1 : -1].double().log_softmax(dim=-1)
        logps.append(logp_LV.gather(1, token_T[len(only.prompt_ids) :, None]).sum())
    return torch.stack(logps)


def band(logp_S: Tensor, dtype: torch.dtype) -> Tensor:
    """What two computations in ``dtype`` may differ by; docs/numerics.md, "The start-up checks"."""
    length_S = torch.tensor(CANDIDATES)
    return FLOAT32_UNITS * torch.finfo(dtype).eps * (logp_S.abs() + length_S.sqrt())


def group() -> TokenizedGroup:
    """Random tokens, the same for every model."""
    generator = torch.Generator().manual_seed(1)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, VOCAB, (count,), generator=generator).tolist())

    return TokenizedGroup(
        row_id="made up", prompt_ids=ids(PROMPT), candidate_ids=tuple(map(ids, CANDIDATES))
    )


def _gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    named = model.named_parameters()
    return {name: weight.grad.clone() for name, weight in named if weight.grad is not None}


def _first_line(error: Exception) -> str:
    text = inspect.cleandoc(str(error)).splitlines() or [type(error).__name__]
    return text[0].strip()
