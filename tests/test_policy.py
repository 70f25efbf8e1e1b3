from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from conftest import build_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
)

from mcpo.pack import pack
from mcpo.policy import HeadScaling, Policy, disable_dropout, group_logps, unpacked
from mcpo.records import TokenizedGroup
from mcpo.self_check import FLOAT32_UNITS, float32_band, plain_logps
from mcpo_kernels.prefix_attention.mask import UnpackableError

GROUPS = [
    TokenizedGroup(
        row_id="a", prompt_ids=(2, 10, 11, 12), candidate_ids=((20, 21, 3), (22, 3), (3,))
    ),
    TokenizedGroup(row_id="b", prompt_ids=(2, 13), candidate_ids=((30, 31, 32, 33, 3), (34, 3))),
]


def policy_of(model: torch.nn.Module, **settings: object) -> Policy:
    return Policy(model, head_impl="auto", autocast_dtype=None, **settings)  # pyright: ignore


def assert_packed_equals_plain(policy: Policy, *, share_prefix: bool) -> None:
    batch = pack(GROUPS, share_prefix=share_prefix)
    logp_PC = group_logps(policy(batch), batch).double()
    for prompt, group in enumerate(GROUPS):
        plain_C = torch.stack(
            [logp_L.sum() for logp_L in plain_logps(policy, group, autocast_dtype=None)]
        )
        packed_C = logp_PC[prompt, : group.num_candidates]
        band_C = float32_band(plain_C, batch.length_PC[prompt, : group.num_candidates])
        assert ((packed_C - plain_C).abs() <= band_C).all(), (packed_C, plain_C)
    assert logp_PC[1, 2] == 0


# Llama's norms compute in float32 whatever the weights, so the band is that of float32.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("share_prefix", [True, False], ids=["shared", "separate"])
def test_packed_logps_equal_plain_forwards(share_prefix: bool, dtype: torch.dtype) -> None:
    assert_packed_equals_plain(policy_of(build_model().to(dtype)), share_prefix=share_prefix)


SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}


def gemma2() -> PreTrainedModel:
    # Every other layer sees four tokens back, fewer than a sequence has.
    return Gemma2ForCausalLM(
        Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=3.0, sliding_window=4)
    )


def cohere() -> PreTrainedModel:
    return CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.3))


def granite() -> PreTrainedModel:
    return GraniteForCausalLM(
        GraniteConfig(
            **SIZES, logits_scaling=4.0, attention_multiplier=0.3, residual_multiplier=0.5
        )
    )


def phi() -> PreTrainedModel:
    return PhiForCausalLM(PhiConfig(**SIZES))


def randomize(model: PreTrainedModel) -> PreTrainedModel:
    """Biases and norms begin at 0 and 1, where forgetting them would not show."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2:
                parameter.add_(torch.randn_like(parameter) / 2)
    return model.eval()


@pytest.mark.parametrize("share_prefix", [True, False], ids=["shared", "separate"])
@pytest.mark.parametrize("build", [gemma2, cohere, granite, phi])
def test_what_a_model_does_to_its_logits_is_kept(build: object, share_prefix: bool) -> None:
    """Softcap and window, a factor, a divisor, a bias of the head."""
    torch.manual_seed(0)
    policy = policy_of(randomize(build()))  # pyright: ignore
    assert_packed_equals_plain(policy, share_prefix=share_prefix)


@pytest.mark.parametrize("build", [gemma2, cohere, granite, phi])
def test_forgetting_it_would_show(build: object) -> None:
    torch.manual_seed(0)
    policy = policy_of(randomize(build()))  # pyright: ignore
    head = policy.model.get_output_embeddings()
    kept = head.scaling, head.bias
    plain = plain_logps(policy, GROUPS[0], autocast_dtype=None)
    head.scaling, head.bias = HeadScaling(), None
    batch = pack(GROUPS[:1], share_prefix=True)
    bare_S = policy(batch).double()
    head.scaling, head.bias = kept
    plain_S = torch.stack([logp_L.sum() for logp_L in plain])
    assert ((bare_S - plain_S).abs() > float32_band(plain_S, batch.length_PC[0])).all()


def plain_gradients(model: PreTrainedModel, weights: torch.Tensor) -> list[torch.Tensor]:
    """Of a weighted sum of the first group's log-probabilities, in the dtype of the model."""
    total = torch.zeros((), dtype=next(model.parameters()).dtype)
    for weight, ids in zip(weights, GROUPS[0].candidate_ids, strict=True):
        tokens = torch.tensor([*GROUPS[0].prompt_ids, *ids])
        logp = model(input_ids=tokens[None]).logits[0].log_softmax(-1)
        total = total + weight * logp[3:-1].gather(1, tokens[4:, None]).sum()
    return list(torch.autograd.grad(total, list(model.parameters())))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_gradients_equal_those_of_plain_forwards(tied: bool) -> None:
    model = build_model(tied=tied)
    weights = torch.tensor([1.0, -0.5, 0.25])
    naive = plain_gradients(model, weights)
    exact = plain_gradients(copy.deepcopy(model).double(), weights)
    policy = policy_of(model)
    batch = pack(GROUPS[:1], share_prefix=True)
    (group_logps(policy(batch), batch)[0] * weights).sum().backward()
    for (name, ours), plain, oracle in zip(model.named_parameters(), naive, exact, strict=True):
        assert ours.grad is not None
        # The budget of the kernels, with the band of a whole float32 model.
        band = FLOAT32_UNITS * torch.finfo(torch.float32).eps * oracle.abs().max()
        budget = 2 * (plain - oracle).abs().max() + band
        assert (ours.grad - oracle).abs().max() <= budget, name


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_gradient_of_embeddings_is_dense_and_the_same_however_it_is_added(tied: bool) -> None:
    """Over two micro-batches; of tokens that come twice too."""
    gradients, asked = [], []
    for spared in (True, False):
        policy = policy_of(build_model(tied=tied).double())
        embeddings = policy.model.get_input_embeddings()
        embeddings.register_forward_pre_hook(lambda module, _: asked.append(module.sparse))
        if not spared:
            embeddings.register_forward_pre_hook(lambda module, _: setattr(module, "sparse", False))
        for groups in (GROUPS, GROUPS[:1]):
            batch = pack(groups, share_prefix=True)
            policy(batch).sum().backward()
        assert not embeddings.sparse
        gradients.append(embeddings.weight.grad)
    assert asked == [tied] * 4
    ours, plain = gradients
    assert not ours.is_sparse
    # A row adds up some ten numbers, in another order.
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-15 * plain.abs().max().item())


def test_light_keeps_logits_and_changes_no_bit_by_it() -> None:
    gradients = []
    for kept in (True, False):
        policy = policy_of(build_model().train(), recompute="light")
        head = policy.model.get_output_embeddings()
        assert head.cache_mb > 0
        head.cache_mb *= kept
        batch = pack(GROUPS, share_prefix=True)
        policy(batch, policy.recompute_of(batch)).sum().backward()
        gradients.append([parameter.grad for parameter in policy.parameters()])
    for ours, plain in zip(*gradients, strict=True):
        assert torch.equal(ours, plain)
    policy.set_recompute("selective")
    assert head.cache_mb == 0


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


class LargestTensor(TorchDispatchMode):
    """Numbers in the largest tensor that any operation returns, those inside our ops included."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # pyright: ignore
        if func.namespace == "mcpo":
            # An op of ours hides what it does, unless its kernel is called under the mode.
            with self:
                cpu = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
                output = func.redispatch(cpu, *args, **(kwargs or {}))
        else:
            output = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return output


def largest_tensor_of_training(head_impl: str, num_vocab: int, num_tokens: int) -> int:
    torch.manual_seed(0)
    sizes = SIZES | {"vocab_size": num_vocab, "hidden_size": 8, "intermediate_size": 16}
    model = LlamaForCausalLM(LlamaConfig(**sizes | {"max_position_embeddings": 2 * num_tokens}))
    policy = Policy(model, head_impl=head_impl, autocast_dtype=None)
    ids = tuple(range(5, 5 + num_tokens // 2))
    group = TokenizedGroup(row_id="a", prompt_ids=(2,), candidate_ids=(ids, ids[::-1]))
    batch = pack([group], share_prefix=True)
    assert len(batch.scored_N) == num_tokens
    with LargestTensor() as largest:
        policy(batch).sum().backward()
    return largest.numel


def test_no_logits_exist() -> None:
    """Nothing of size [tokens, vocabulary] is made, forward or backward."""
    # Five slabs of 2048 columns; N * V is 20 times the weight and 5 times a slab of logits.
    num_vocab, num_tokens = 5 * 2048, 160
    logits = num_tokens * num_vocab
    assert largest_tensor_of_training("auto", num_vocab, num_tokens) <= logits // 5
    assert largest_tensor_of_training("reference", num_vocab, num_tokens) >= logits


def test_unpacked_gives_the_model_back_for_generation() -> None:
    policy = policy_of(build_model())
    with unpacked(policy) as model:
        text = model.generate(torch.tensor([[2, 10]]), max_new_tokens=3, do_sample=False)
    assert text.shape[1] >= 3
    batch = pack(GROUPS, share_prefix=True)
    assert policy(batch).isfinite().all()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_saved_model_is_the_plain_one(tmp_path: Path, tied: bool) -> None:
    model = build_model(tied=tied).eval()
    tokens = torch.tensor([[2, 10, 11, 12, 20]])
    with torch.no_grad():
        before = model(tokens).logits
        policy_of(model).model.save_pretrained(tmp_path)
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        assert type(reloaded.get_output_embeddings()) is torch.nn.Linear
        assert reloaded.config._attn_implementation == "sdpa"
        assert torch.equal(reloaded.eval()(tokens).logits, before)


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


def bloom() -> PreTrainedModel:
    return BloomForCausalLM(BloomConfig(vocab_size=97, hidden_size=32, n_layer=1, n_head=4))


def gptj() -> PreTrainedModel:
    sizes = {"vocab_size": 97, "n_embd": 32, "n_layer": 1, "n_head": 4, "rotary_dim": 4}
    return GPTJForCausalLM(GPTJConfig(**sizes, bos_token_id=2, eos_token_id=3))


@pytest.mark.parametrize("build", [bloom, gptj])
def test_a_model_whose_attention_cannot_be_set_is_refused(build: object) -> None:
    """It would ignore the packed layout, and candidates of one token would not even show it."""
    model = build()  # pyright: ignore
    head = model.get_output_embeddings()
    with pytest.raises(
        UnpackableError,
        match=rf"{type(model).__name__} cannot be packed.*AttentionInterface, and stayed 'eager'",
    ):
        policy_of(model)
    assert model.get_output_embeddings() is head


@pytest.mark.parametrize("mode", ["light", "selective", "full"])
def test_plain_forwards_recompute_by_the_model_alone(mode):
    group = TokenizedGroup(
        row_id="a", prompt_ids=(5, 6, 7), candidate_ids=((8, 9, 10), (11, 12), (13, 14, 15, 16))
    )
    batch = pack([group], share_prefix=False)

    def gradients(recompute):
        policy = Policy(
            build_model(), head_impl="auto", autocast_dtype=None, recompute=recompute, packs=False
        ).train()
        # No rows are chosen: there is nothing that the step could say.
        assert policy.recompute_of(batch) is None
        assert policy.model.is_activation_checkpointing == (recompute != "none")
        policy(batch).sum().backward()
        return [p.grad for p in policy.parameters()]

    for ours, plain in zip(gradients(mode), gradients("none"), strict=True):
        assert torch.equal(ours, plain)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_decoding_keeps_its_cache_when_plain_forwards_recompute(mode):
    token_1L = torch.tensor([[5, 6, 7, 8]])

    def decoded(policy):
        with unpacked(policy) as model, torch.no_grad():
            assert not model.training
            first = model(input_ids=token_1L[:, :-1], use_cache=True)
            last = model(
                input_ids=token_1L[:, -1:], past_key_values=first.past_key_values, use_cache=True
            )
        assert policy.model.training
        return last.logits[0, -1]

    policy = Policy(
        build_model(), head_impl="auto", autocast_dtype=None, recompute=mode, packs=True
    ).train()
    packed = decoded(policy)
    policy.stop_packing()
    assert torch.equal(decoded(policy), packed)
    with unpacked(policy) as model, torch.no_grad():
        whole = model(input_ids=token_1L, use_cache=False).logits[0, -1]
    torch.testing.assert_close(packed, whole)
