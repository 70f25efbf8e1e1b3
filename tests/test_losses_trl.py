"""Values and gradients of losses against TRL's own code, where TRL is installed.

Its trainers are not built: their methods are called with what they read of themselves, and with a
model that returns log-probabilities of tokens, of which both sides take sums.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Generator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scored_batches import config_of, scored

from mcpo.config import LossConfig
from mcpo.losses import LOSSES, terms_of
from mcpo.records import Baselines, ScoredBatch

pytest.importorskip("trl")
BETA, LENGTHS = 0.3, (4, 2, 3, 5, 1, 4)
CHOSEN_TOKENS = sum(LENGTHS[::2])
ALONE = SimpleNamespace(
    device=torch.device("cpu"), gather=lambda value: value, gather_for_metrics=lambda value: value
)


@pytest.fixture(autouse=True)
def in_float64(monkeypatch: pytest.MonkeyPatch, exact_softmax: None) -> Generator[None]:
    """TRL makes some constants in the default dtype, and casts its odds to float32."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def token_logps() -> tuple[torch.Tensor, torch.Tensor]:
    """[6, 5] log-probabilities of tokens, 0 behind the end; chosen at even places, and the mask."""
    generator = torch.Generator().manual_seed(3)
    mask = torch.arange(5) < torch.tensor(LENGTHS)[:, None]
    return -3 * torch.rand(6, 5, generator=generator) * mask, mask


def ours(logp_SL: torch.Tensor, **fields: Any) -> ScoredBatch:
    """Three pairs of the same tokens."""
    logp_PC = logp_SL.sum(1).view(3, 2)
    return scored(
        logp_PC,
        [[1]] * 3,
        length_PC=torch.tensor(LENGTHS).view(3, 2),
        mean_chosen_length=CHOSEN_TOKENS / 3,
        **({"baselines": Baselines()} | fields),
    )


def assert_same(
    mine: Callable[[torch.Tensor], torch.Tensor], theirs: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """As functions of the log-probabilities of tokens."""
    logp_SL, _ = token_logps()
    found = []
    for loss in (mine, theirs):
        leaf = logp_SL.clone().requires_grad_()
        result = loss(leaf)
        (gradient,) = torch.autograd.grad(result, leaf)
        _, mask = token_logps()
        found.append((result.detach(), gradient * mask))
    # Sums of a few tokens in another order, on numbers of at most some hundreds.
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-13, atol=1e-13)


def dpo_trainer(config: LossConfig, names: list[str], logp_SL: torch.Tensor) -> torch.Tensor:
    """``DPOTrainer._compute_loss``, whose batch holds the chosen ones first."""
    from trl.trainer.dpo_trainer import DPOTrainer

    _, mask = token_logps()
    order = torch.tensor([0, 2, 4, 1, 3, 5])
    ref = ours(logp_SL).ref_logp_PC
    with_prompt = torch.nn.functional.pad(mask[order], (1, 0)).long()
    outputs = SimpleNamespace(
        log_probs=logp_SL[order],
        entropy=torch.zeros(6, 5),
        mean_logits=torch.zeros(6, 5),
        is_top1=mask[order],
    )
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=ALONE,
        ld_alpha=None,
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        use_weighting=False,
        f_divergence_type="reverse_kl",
        beta=config.beta,
        loss_types=names,
        loss_weights=config.loss_weights or [1.0] * len(names),
        label_smoothing=config.label_smoothing,
        _metrics={"eval": defaultdict(list)},
        _total_train_tokens=0,
    )
    inputs = {
        "input_ids": torch.zeros_like(with_prompt),
        "attention_mask": torch.ones_like(with_prompt),
        "completion_mask": with_prompt,
        "ref_chosen_logps": ref[:, 0],
        "ref_rejected_logps": ref[:, 1],
    }
    compute: Any = DPOTrainer._compute_loss
    return compute(trainer, lambda **_: outputs, inputs, False)


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("dpo", "sigmoid"),
        ("robust", "robust"),
        ("exo", "exo_pair"),
        ("hinge", "hinge"),
        ("ipo", "ipo"),
        ("bco", "bco_pair"),
        ("apo_zero", "apo_zero"),
        ("apo_down", "apo_down"),
        ("sppo", "sppo_hard"),
        ("nca", "nca_pair"),
        ("sft", "sft"),
    ],
)
def test_losses_of_trls_dpo_trainer(name: str, theirs: str) -> None:
    config = config_of(name)
    assert_same(
        lambda logp_SL: LOSSES[name](ours(logp_SL), config).mean(),
        lambda logp_SL: dpo_trainer(config, [theirs], logp_SL),
    )


def test_rpo_and_weighted_sums_of_trls_dpo_trainer() -> None:
    weighted = LossConfig(loss_type=("dpo", "sft"), loss_weights=(1.0, 0.4), beta=BETA)
    assert_same(
        lambda logp_SL: LOSSES["rpo"](ours(logp_SL), config_of("rpo", rpo_alpha=0.4)).mean(),
        lambda logp_SL: dpo_trainer(weighted, ["sigmoid", "sft"], logp_SL),
    )
    assert_same(
        lambda logp_SL: sum(
            (t.weight * t.loss(ours(logp_SL), weighted).mean() for t in terms_of(weighted)),
            start=torch.zeros(()),
        ),
        lambda logp_SL: dpo_trainer(weighted, ["sigmoid", "sft"], logp_SL),
    )


def test_kto_of_trls_trainer() -> None:
    """Given what TRL estimates from the mismatched pairs of the batch, as z0."""
    from trl.trainer.kto_trainer import KTOTrainer

    mismatched = torch.tensor([-1.0, 2.0, 3.5, -0.5, 1.0, 0.7])
    z0 = BETA * float(mismatched.mean())

    def theirs(logp_SL: torch.Tensor) -> torch.Tensor:
        _, mask = token_logps()
        with_prompt = torch.nn.functional.pad(mask, (1, 0)).long()
        trainer = SimpleNamespace(
            model=SimpleNamespace(training=False),
            accelerator=ALONE,
            beta=BETA,
            aux_loss_enabled=False,
            precompute_ref_logps=True,
            calculate_KL=True,
            loss_type="kto",
            desirable_weight=1.0,
            undesirable_weight=1.0,
            _compute_kl_logps=lambda *_: mismatched,
            _metrics={"eval": defaultdict(list)},
            _total_train_tokens=0,
        )
        batch = {
            "input_ids": torch.zeros_like(with_prompt),
            "attention_mask": torch.ones_like(with_prompt),
            "completion_mask": with_prompt,
            "label": torch.tensor([True, False] * 3),
            "ref_logps": ours(logp_SL).ref_logp_PC.flatten(),
            "ref_KL_logps": torch.zeros(6),
        }
        outputs = SimpleNamespace(
            log_probs=logp_SL, entropy=torch.zeros(6, 5), mean_logits=torch.zeros(6, 5)
        )
        compute: Any = KTOTrainer._compute_loss
        return compute(trainer, lambda **_: outputs, batch, False)

    # Its mean is over six examples, ours over three pairs.
    baselines = Baselines(z0=z0)
    assert_same(
        lambda logp_SL: (
            LOSSES["kto"](ours(logp_SL, baselines=baselines), config_of("kto")).mean() / 2
        ),
        theirs,
    )


def nll(logp_SL: torch.Tensor) -> torch.Tensor:
    """What its trainers take from cross entropy: the mean over the chosen tokens of the batch."""
    return -logp_SL[::2].sum() / CHOSEN_TOKENS


@pytest.mark.parametrize(("name", "theirs"), [("simpo", "simpo"), ("cpo", "sigmoid")])
def test_losses_of_trls_cpo_trainer(name: str, theirs: str) -> None:
    from trl.experimental.cpo import CPOTrainer

    config = config_of(name, cpo_alpha=0.7)

    def loss(logp_SL: torch.Tensor) -> torch.Tensor:
        trainer = SimpleNamespace(
            alpha=0.0,
            accelerator=ALONE,
            loss_type=theirs,
            beta=BETA,
            simpo_gamma=config.simpo_gamma,
            label_smoothing=config.label_smoothing,
        )
        compute: Any = CPOTrainer.cpo_loss
        logp_S = logp_SL.sum(1)
        if name == "simpo":
            logp_S = logp_S / torch.tensor(LENGTHS)
        losses, _, _ = compute(trainer, logp_S[::2], logp_S[1::2])
        return losses.mean() + (0.7 * nll(logp_SL) if name == "cpo" else 0.0)

    assert_same(lambda logp_SL: LOSSES[name](ours(logp_SL), config).mean(), loss)


def test_orpo_of_trls_trainer() -> None:
    from trl.experimental.orpo import ORPOTrainer

    def theirs(logp_SL: torch.Tensor) -> torch.Tensor:
        compute: Any = ORPOTrainer.odds_ratio_loss
        trainer = SimpleNamespace(beta=BETA, accelerator=ALONE)
        logp_S = logp_SL.sum(1) / torch.tensor(LENGTHS)
        losses, *_ = compute(trainer, logp_S[::2], logp_S[1::2])
        return nll(logp_SL) - losses.mean()

    assert_same(lambda logp_SL: LOSSES["orpo"](ours(logp_SL), config_of("orpo")).mean(), theirs)
