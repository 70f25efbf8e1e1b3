from __future__ import annotations

import copy

import pytest
import torch
from conftest import build_model
from transformers import GPT2Config, GPT2LMHeadModel

from mcpo.pack import pack
from mcpo.policy import HeadScaling, Policy, disable_dropout, group_logps, unpacked
from mcpo.records import TokenizedGroup
from mcpo.self_check import plain_logps

GROUPS = [
    TokenizedGroup(
        row_id="a", prompt_ids=(2, 10, 11, 12), candidate_ids=((20, 21, 3), (22, 3), (3,))
    ),
    TokenizedGroup(row_id="b", prompt_ids=(2, 13), candidate_ids=((30, 31, 32, 33, 3), (34, 3))),
]


def policy_of(model: torch.nn.Module, **settings: object) -> Policy:
    return Policy(model, head_impl="auto", autocast_dtype=None, **settings)  # pyright: ignore


@pytest.mark.parametrize("share_prefix", [True, False], ids=["shared", "separate"])
def test_packed_logps_equal_plain_forwards(share_prefix: bool) -> None:
    policy = policy_of(build_model().double())
    batch = pack(GROUPS, share_prefix=share_prefix)
    logp_PC = group_logps(policy(batch), batch)
    for prompt, group in enumerate(GROUPS):
        plain_C = plain_logps(policy, group, autocast_dtype=None)
        # Llama's norms compute in float32 whatever the weights: 1e-5 is their rounding.
        torch.testing.assert_close(
            logp_PC[prompt, : group.num_candidates], plain_C, rtol=0, atol=1e-4
        )
    assert logp_PC[1, 2] == 0


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_gradients_equal_those_of_plain_forwards(tied: bool) -> None:
    model = build_model(tied=tied)
    plain = copy.deepcopy(model)
    policy = policy_of(model)
    batch = pack(GROUPS[:1], share_prefix=True)
    weights = torch.tensor([1.0, -0.5, 0.25])
    (group_logps(policy(batch), batch)[0] * weights).sum().backward()
    total = torch.zeros(())
    for weight, ids in zip(weights, GROUPS[0].candidate_ids, strict=True):
        tokens = torch.tensor([*GROUPS[0].prompt_ids, *ids])
        logp = plain(input_ids=tokens[None]).logits[0].log_softmax(-1)
        total = total + weight * logp[3:-1].gather(1, tokens[4:, None]).sum()
    total.backward()
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert ours.grad is not None
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_gradient_checkpointing_changes_nothing() -> None:
    gradients = []
    for checkpointed in (False, True):
        model = build_model()
        if checkpointed:
            model.activation_checkpointing_enable()
        policy = policy_of(model.train())
        batch = pack(GROUPS, share_prefix=True)
        policy(batch).sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


def test_no_logits_exist() -> None:
    """Nothing of size [tokens, vocabulary] is allocated, forward or backward."""
    policy = policy_of(build_model())
    batch = pack(GROUPS, share_prefix=True)
    num_scored = len(batch.scored_N)
    shapes: set[tuple[int, ...]] = set()
    handles = [
        module.register_forward_hook(lambda _, __, output: shapes.add(tuple(output.shape)))
        for module in policy.modules()
        if isinstance(module, torch.nn.Linear)
    ]
    policy(batch)
    for handle in handles:
        handle.remove()
    assert (batch.num_seqs,) in shapes
    assert not any(shape[-1] == 97 for shape in shapes)
    assert num_scored == sum(len(ids) for group in GROUPS for ids in group.candidate_ids)


def test_unpacked_gives_the_model_back_for_generation() -> None:
    policy = policy_of(build_model())
    with unpacked(policy) as model:
        text = model.generate(torch.tensor([[2, 10]]), max_new_tokens=3, do_sample=False)
    assert text.shape[1] >= 3
    batch = pack(GROUPS, share_prefix=True)
    assert policy(batch).isfinite().all()


def test_saved_model_is_the_plain_one(tmp_path: object) -> None:
    model = build_model()
    names = set(model.state_dict())
    assert set(policy_of(model).model.state_dict()) == names


def test_dropout_is_off_in_training_mode() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=50))
    disable_dropout(model)
    model.train()
    tokens = torch.tensor([[1, 2, 3]])
    assert torch.equal(model(tokens).logits, model(tokens).logits)


def test_head_scaling_reads_the_names_models_use() -> None:
    config = build_model().config
    assert HeadScaling.of(config) == HeadScaling()
    config.logits_scaling = 8.0
    config.final_logit_softcapping = 30.0
    assert HeadScaling.of(config) == HeadScaling(scale=1 / 8, softcap=30.0)
    del config.logits_scaling
    config.logit_scale = 0.0625
    assert HeadScaling.of(config).scale == 0.0625


def test_a_model_without_linear_head_is_refused() -> None:
    model = build_model()
    model.set_output_embeddings(torch.nn.Identity())
    with pytest.raises(ValueError, match=r"must end in a linear output projection.*got Identity"):
        policy_of(model)
