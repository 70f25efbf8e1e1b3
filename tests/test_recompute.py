"""Which mode a run takes, and that every mode gives the gradients of the naive computation."""

from __future__ import annotations

import pytest
import sharded_step
import torch
from conftest import build_model, torchrun
from test_step import GROUPS as STEP_GROUPS
from test_step import references_of
from tiny_models import CONFIGS, float64_model
from torch.nn.functional import logsigmoid
from transformers import LlamaConfig

from mcpo.cli import make_config
from mcpo.engine.single import SingleEngine
from mcpo.mc_kernel import Draw
from mcpo.pack import pack
from mcpo.policy import Policy, unpacked
from mcpo.recompute import activation_bytes, device_memory, resolve_recompute
from mcpo.records import TokenizedGroup
from mcpo.reference_cache import ReferenceLogps
from mcpo.step import NonFiniteError, StepWork, segments_with_gradient, train_step

RECOMPUTING = ("light", "selective", "full")


def ids(count: int, seed: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(3, 61, (count,), generator=generator).tolist())


def group(row_id: str, prompt: int, lengths: tuple[int, ...]) -> TokenizedGroup:
    candidates = tuple(ids(length, seed) for seed, length in enumerate(lengths, start=prompt))
    return TokenizedGroup(row_id=row_id, prompt_ids=ids(prompt, 0), candidate_ids=candidates)


# Ragged pools; sequences longer than the windows of six; a candidate of one token.
GROUPS = [group("a", 9, (6, 4, 6, 2)), group("b", 4, (8, 1, 8)), group("c", 7, (3, 9))]
BATCH = pack(GROUPS, share_prefix=True)
# Without replacement, so that the last prompt has no second negative to draw.
DRAW = Draw(
    negative_PM=torch.tensor([[3, 1], [2, 1], [1, 1]]),
    mask_PM=torch.tensor([[True, True], [True, False], [True, False]]),
    ess_P=torch.ones(3),
    entropy_P=torch.ones(3),
    rank_PM=torch.ones(3, 2),
)
PAIRS = [(0, 0, 3), (0, 0, 1), (1, 0, 2), (2, 0, 1)]


def loss_of(logp_S: torch.Tensor) -> torch.Tensor:
    """Of chosen and drawn candidates alone, as a loss is."""
    seq = BATCH.seq_of_PC
    margins = [logp_S[seq[p, c]] - logp_S[seq[p, d]] for p, c, d in PAIRS]
    return -logsigmoid(0.1 * torch.stack(margins)).sum()


def naive_loss(policy: Policy) -> torch.Tensor:
    """Every candidate in a padded row of its own, the model's own attention and logits."""
    rows = [(g.prompt_ids, own) for g in GROUPS for own in g.candidate_ids]
    width = max(len(prompt) + len(own) for prompt, own in rows)
    token_SL, mask_SL = torch.zeros(2, len(rows), width, dtype=torch.int64)
    for row, (prompt, own) in enumerate(rows):
        token_SL[row, : len(prompt) + len(own)] = torch.tensor([*prompt, *own])
        mask_SL[row, : len(prompt) + len(own)] = 1
    with unpacked(policy) as model:
        logit_SLV = model(input_ids=token_SL, attention_mask=mask_SL, use_cache=False).logits
    logp_SL = logit_SLV[:, :-1].log_softmax(-1).gather(2, token_SL[:, 1:, None])[..., 0]
    return loss_of(
        torch.stack(
            [
                logp_SL[row, len(prompt) - 1 : len(prompt) + len(own) - 1].sum()
                for row, (prompt, own) in enumerate(rows)
            ]
        )
    )


def gradients(policy: Policy, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    policy.zero_grad(set_to_none=True)
    loss.backward()
    named = policy.model.named_parameters()
    return {name: weight.grad for name, weight in named if weight.grad is not None}


def recomputed_loss(policy: Policy, mode: str) -> torch.Tensor:
    policy.recompute = mode
    recompute = policy.recompute_of(BATCH)
    logp_S = policy(BATCH, recompute)
    if mode in ("light", "selective"):
        recompute.choose(segments_with_gradient(BATCH, DRAW))
    return loss_of(logp_S)


def assert_same(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        # Some thousand roundings of float64; one of float32 is 6e-8.
        atol = 1e-12 * gradient.abs().max().item()
        torch.testing.assert_close(ours[name], gradient, rtol=0, atol=atol)


@pytest.mark.usefixtures("exact_softmax")
@pytest.mark.parametrize("name", CONFIGS)
def test_every_mode_has_the_gradients_of_the_padded_group(name: str) -> None:
    policy = Policy(
        float64_model(name), head_impl="auto", autocast_dtype=None, recompute="selective"
    )
    padded = naive_loss(policy)
    expected = gradients(policy, padded)
    plain = loss_of(policy(BATCH))
    assert_same(gradients(policy, plain), expected)
    for mode in RECOMPUTING:
        loss = recomputed_loss(policy, mode)
        torch.testing.assert_close(loss, padded, rtol=1e-12, atol=0)
        assert torch.equal(loss, plain)
        assert_same(gradients(policy, loss), expected)


def test_the_step_keeps_prompts_chosen_and_drawn_candidates() -> None:
    """Segments 0, 5 and 9 are the prompts, which stay by themselves."""
    assert sorted(set(segments_with_gradient(BATCH, DRAW))) == [1, 2, 4, 6, 8, 10, 11]
    separate = pack(GROUPS, share_prefix=False)
    assert sorted(set(segments_with_gradient(separate, DRAW))) == [0, 1, 3, 4, 6, 7, 8]


def error_of_bf16(mode: str) -> float:
    """Relative to the gradient in float32, in the Euclidean norm."""
    found = []
    for dtype, run_mode in ((None, "none"), (torch.bfloat16, mode)):
        policy = Policy(
            build_model().train(), head_impl="auto", autocast_dtype=dtype, recompute="selective"
        )
        named = gradients(policy, recomputed_loss(policy, run_mode))
        found.append(torch.cat([gradient.flatten() for gradient in named.values()]))
    return float((found[1] - found[0]).norm() / found[0].norm())


@pytest.mark.parametrize("mode", ["light", "selective"])
def test_bf16_errs_no_more_than_with_plain_checkpointing(mode: str) -> None:
    # Products of fewer rows may round otherwise; twice is the factor of the kernels' budgets.
    assert error_of_bf16(mode) <= 2 * error_of_bf16("full")
    assert error_of_bf16("full") > 1e-4


def engine_of(mode: str, dtype: torch.dtype = torch.float64) -> SingleEngine:
    policy = Policy(
        build_model().to(dtype).train(), head_impl="auto", autocast_dtype=None, recompute=mode
    )
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    return SingleEngine(policy, optimizer, torch.device("cpu"))


@pytest.mark.parametrize("num_negatives", [1, 3])
@pytest.mark.parametrize("share_prefix", [True, False], ids=["shared", "separate"])
@pytest.mark.parametrize("mode", RECOMPUTING)
def test_a_step_is_the_same_in_every_mode(
    mode: str, share_prefix: bool, num_negatives: int
) -> None:
    """Metrics, weights, and two micro-batches that accumulate."""
    config = make_config({"num_negatives": num_negatives, "max_grad_norm": 1e9})
    batches = tuple(
        pack(groups, share_prefix=share_prefix) for groups in (STEP_GROUPS[:4], STEP_GROUPS[4:])
    )
    work = StepWork(step=0, batches=batches, num_prompts=6)
    found = []
    for engine in (engine_of("none"), engine_of(mode)):
        metrics = train_step(engine, work, references_of(engine_of("none")), config)
        found.append(
            (metrics, torch.cat([p.detach().flatten() for p in engine.policy.parameters()]))
        )
    (plain, weights), (recomputed, same) = found
    assert recomputed == pytest.approx(plain, rel=1e-6)
    start = torch.cat([p.detach().flatten() for p in engine_of("none").policy.parameters()])
    moved = float((weights - start).abs().max())
    assert moved > 1e-4
    # Llama's norms compute in float32 whatever the weights.
    torch.testing.assert_close(same, weights, rtol=0, atol=1e-4 * moved)


@pytest.mark.parametrize("mode", RECOMPUTING)
def test_what_is_not_finite_is_reported_as_without_recompute(mode: str) -> None:
    engine = engine_of(mode)
    logps = references_of(engine).logps
    broken = ReferenceLogps(logps={**logps, "r2": (float("nan"),) * len(logps["r2"])})
    batches = (pack(STEP_GROUPS, share_prefix=True),)
    work = StepWork(step=4, batches=batches, num_prompts=6)
    with pytest.raises(NonFiniteError, match=r"the loss of rows \['r2'\] is not finite"):
        train_step(engine, work, broken, make_config({}))
    with torch.no_grad():
        next(engine.policy.parameters())[7:] = torch.inf
    with pytest.raises(NonFiniteError, match="step 4: the loss of rows"):
        train_step(engine, work, references_of(engine_of("none")), make_config({}))


MODEL = build_model()


def resolved(
    memory: int = 10**12, groups=GROUPS, model=MODEL, packs: bool = True, **options: object
):
    return resolve_recompute(make_config(options), groups, model, memory, packs=packs)


@pytest.mark.parametrize(
    ("options", "mode"),
    [
        ({"recompute": "none"}, "none"),
        ({"recompute": "full"}, "full"),
        ({"gradient_checkpointing": True}, "selective"),
        ({"gradient_checkpointing": False}, "none"),
    ],
)
def test_a_mode_that_is_asked_for_is_taken(options: dict[str, object], mode: str) -> None:
    assert resolved(0, **options) == (mode, "it was given")


def test_auto_takes_the_cheapest_that_fits() -> None:
    assert resolved().mode == "light"
    assert "% of the tokens have a gradient" in resolved().reason
    # Weights with what AdamW keeps, their casts, activations and logits.
    needed = (16 + 2) * MODEL.num_parameters() + 2**28
    needed += 2 * activation_bytes(MODEL.config, BATCH.layout.num_tokens, "light")
    assert resolved(needed).mode == "light"
    tight = resolved(needed - 1)
    assert tight.mode == "selective"
    assert "'light' does not fit" in tight.reason
    # Where all candidates are drawn there is nothing to leave out.
    assert resolved(num_negatives=3).mode == "none"
    assert resolved(num_negatives=3, prefix_sharing=False).mode == "none"


def test_auto_leaves_a_model_alone_whose_layers_cannot_be_replayed() -> None:
    found = resolved(model=torch.nn.Linear(1, 1))
    assert found.mode == "none"
    assert "GradientCheckpointingLayers to be recomputed" in found.reason
    bare = build_model()
    bare.model.layers = torch.nn.ModuleList()
    with pytest.raises(ValueError, match="and it has none; train it without recompute"):
        Policy(bare, head_impl="auto", autocast_dtype=None, recompute="full")


@pytest.mark.parametrize("mode", RECOMPUTING)
def test_a_model_that_is_not_packed_replays_all_or_nothing(mode: str) -> None:
    plain = {"packs": False, "prefix_sharing": "off"}
    assert resolved(**plain).mode == "none"
    assert "'none' does not fit" in resolved(0, **plain).reason
    assert resolved(0, **plain).mode == "full"
    assert resolved(recompute="none", **plain) == ("none", "it was given")
    given = resolved(recompute=mode, **plain)
    assert given.mode == "full"
    assert given.reason.startswith(f"'{mode}' was given")
    unable = build_model()
    unable.supports_gradient_checkpointing = False
    assert resolved(0, model=unable, **plain).mode == "none"
    with pytest.raises(ValueError, match=r"Llama.*, which does not; train it with recompute: none"):
        resolved(model=unable, recompute=mode, **plain)


def test_memory_is_reckoned_for_the_batches_that_a_plain_model_gets() -> None:
    """With prompts repeated, which the packed batches of the same groups would share."""
    plain = {"packs": False, "prefix_sharing": "off"}
    tokens = pack(GROUPS, share_prefix=False).layout.num_tokens
    assert tokens > BATCH.layout.num_tokens
    needed = 18 * MODEL.num_parameters() + 2 * activation_bytes(MODEL.config, tokens, "none")
    assert resolved(needed, **plain).mode == "none"
    assert resolved(needed - 1, **plain).mode == "full"


def test_one_option_under_two_names_is_refused() -> None:
    with pytest.raises(ValueError, match="one option under two names: give one"):
        make_config({"gradient_checkpointing": True, "recompute": "full"})


def test_modes_need_less_memory_in_this_order() -> None:
    deep = LlamaConfig(num_hidden_layers=12)
    sizes = [activation_bytes(deep, 100, mode) for mode in ("none", "light", "full")]
    assert sizes == sorted(sizes, reverse=True)


def test_processes_share_the_memory_of_a_machine() -> None:
    whole = device_memory(torch.device("cpu"), 1)
    assert whole > 1e8
    assert device_memory(torch.device("cpu"), 4) == whole // 4


def test_outside_of_a_step_the_layers_are_as_they_were() -> None:
    """Checkpointed layers in training mode drop the cache, and decoding would go wrong."""
    policy = engine_of("light").policy
    batch = pack(STEP_GROUPS, share_prefix=True)
    token_BL = torch.tensor([[2, 10, 11]])
    with unpacked(policy) as model:
        before = model(token_BL, use_cache=True)
    policy(batch, policy.recompute_of(batch)).sum().backward()
    with unpacked(policy) as model:
        after = model(token_BL, use_cache=True)
    assert before.past_key_values.get_seq_length() == 3
    assert after.past_key_values.get_seq_length() == 3


def test_hooks_of_ddp_and_fsdp2_find_what_they_expect() -> None:
    """One process, whose parameters are gathered and freed as those of many."""
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        sharded_step.main()
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_ddp_and_fsdp2_on_two_processes() -> None:
    torchrun({}, 2, job="tests/sharded_step.py")
