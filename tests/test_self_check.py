from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable
from functools import partial

import pytest
import torch
from conftest import build_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from mcpo.config import LossConfig
from mcpo.losses import dpo, mcpo
from mcpo.pack import pack
from mcpo.policy import Policy, group_logps
from mcpo.records import ScoredBatch, TokenizedGroup
from mcpo.reference_cache import ReferenceLogps, unpack
from mcpo.self_check import (
    CANDIDATES_PER_GROUP,
    CHECKED_GROUPS,
    ROWS_PER_SLAB,
    TOKENS_PER_GROUP,
    check_packing,
    check_reference,
    float32_band,
    plain_logps,
    telling_groups,
)

GROUPS = [
    TokenizedGroup(row_id="a", prompt_ids=(2, 10, 11, 12), candidate_ids=((20, 21, 3), (22, 3))),
    TokenizedGroup(
        row_id="b",
        prompt_ids=(2, 13),
        candidate_ids=((30, 31, 32, 3), (34, 3), (35, 36, 3), (37, 3)),
    ),
]
BATCH = pack(GROUPS, share_prefix=True)
DTYPES = pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])


def policy_of(autocast_dtype: torch.dtype | None = None, seed: int = 0) -> Policy:
    return Policy(build_model(seed).eval(), head_impl="auto", autocast_dtype=autocast_dtype)


def disturbed(dtype: torch.dtype | None) -> Policy:
    """Stands for linear-attention hybrids, whose state runs on from one segment to the next."""
    policy = policy_of(dtype)
    layer = policy.model.model.layers[0]
    layer.register_forward_hook(
        lambda _, __, output: output + 3.0 * torch.nn.functional.pad(output, (0, 0, 1, 0))[:, :-1]
    )
    return policy


def references_of(policy: Policy, shift: float = 0.0, only: str | None = None) -> ReferenceLogps:
    with torch.no_grad():
        logps = unpack(group_logps(policy(BATCH), BATCH), BATCH)
    return ReferenceLogps(
        logps={
            group.row_id: tuple(
                logp + (shift if only in (None, group.row_id) else 0.0) for logp in row
            )
            for group, row in zip(GROUPS, logps, strict=True)
        }
    )


def random_group(draw: random.Random, num_candidates: int, num_vocab: int) -> TokenizedGroup:
    def ids(least: int, most: int) -> tuple[int, ...]:
        return tuple(draw.choices(range(5, num_vocab), k=draw.randint(least, most)))

    return TokenizedGroup(
        row_id=f"r{draw.random()}",
        prompt_ids=ids(20, 60),
        candidate_ids=tuple(ids(20, 80) for _ in range(num_candidates)),
    )


def refusals(count: int, *, num_groups: int, num_candidates: int) -> int:
    """Of a healthy model in bf16, by as many checks."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.1,
    )
    policy = Policy(LlamaForCausalLM(config), head_impl="auto", autocast_dtype=torch.bfloat16)
    draw = random.Random(0)
    refused = 0
    for _ in range(count):
        groups = [random_group(draw, num_candidates, 512) for _ in range(num_groups)]
        try:
            check_packing(policy, groups, share_prefix=True)
        except ValueError:
            refused += 1
    return refused


@DTYPES
@pytest.mark.parametrize("share_prefix", [True, False], ids=["shared", "separate"])
def test_a_followed_layout_passes(dtype: torch.dtype | None, share_prefix: bool) -> None:
    rounding = check_packing(policy_of(dtype), GROUPS, share_prefix=share_prefix)
    sharp = check_packing(policy_of(None), GROUPS, share_prefix=share_prefix)
    assert 0 < sharp <= rounding
    # What is found in float32 lies within its own band.
    assert sharp <= float32_band(torch.tensor(100.0), torch.tensor(1.0))


def test_healthy_bf16_models_are_not_refused() -> None:
    """Two candidates are the fewest errors the budget can be taken from."""
    assert refusals(60, num_groups=1, num_candidates=2) == 0


@pytest.mark.slow
@pytest.mark.parametrize(("num_groups", "num_candidates"), [(1, 2), (1, 4), (4, 4)])
def test_hundreds_of_healthy_bf16_models_are_not_refused(
    num_groups: int, num_candidates: int
) -> None:
    assert refusals(300, num_groups=num_groups, num_candidates=num_candidates) == 0


@DTYPES
@pytest.mark.parametrize("share_prefix", [True, False], ids=["shared", "separate"])
def test_a_model_that_mixes_tokens_outside_attention_is_refused(
    dtype: torch.dtype | None, share_prefix: bool
) -> None:
    with pytest.raises(ValueError, match="LlamaForCausalLM must give the same log-probabilities"):
        check_packing(disturbed(dtype), GROUPS, share_prefix=share_prefix)


@DTYPES
def test_a_first_group_that_shows_nothing_hides_nothing(dtype: torch.dtype | None) -> None:
    silent = TokenizedGroup(row_id="s", prompt_ids=(2, 10), candidate_ids=((20,), (22,)))
    with pytest.raises(ValueError, match=r"row '[ab]', a candidate of [2-4] tokens"):
        check_packing(disturbed(dtype), [silent, *GROUPS], share_prefix=True)
    # Where no candidate is an input there still is the next group.
    with pytest.raises(ValueError, match=r"row 's', a candidate of 1 tokens"):
        check_packing(disturbed(dtype), [silent, silent], share_prefix=True)


def test_the_telling_groups_have_the_longest_candidates() -> None:
    def group(row_id: str, *lengths: int, prompt: int = 3) -> TokenizedGroup:
        return TokenizedGroup(
            row_id=row_id,
            prompt_ids=(2,) * prompt,
            candidate_ids=tuple((7,) * length for length in lengths),
        )

    huge = group("huge", 2 * TOKENS_PER_GROUP, 1, 2)
    wide = group("wide", *range(1, 9))
    plenty = [group(f"g{size}", size, 1) for size in (50, 10, 40, 20, 30)]
    chosen = telling_groups([huge, wide, *plenty])
    assert [some.row_id for some in chosen] == ["g50", "g40", "g30", "wide"]
    assert len(chosen) == CHECKED_GROUPS
    assert [len(ids) for ids in chosen[-1].candidate_ids] == [8, 7, 6, 5]
    assert chosen[-1].num_candidates == CANDIDATES_PER_GROUP
    long = group("long", 300, 300, 300, 300, prompt=100)
    assert telling_groups([long])[0].num_candidates == 2
    assert [some.row_id for some in telling_groups([huge, long, huge])] == ["long"]
    assert [some.row_id for some in telling_groups([huge])] == ["huge"]
    with pytest.raises(ValueError, match="must hold at least one group to pack"):
        check_packing(policy_of(), [], share_prefix=True)


def test_a_group_beyond_the_longest_window_is_added() -> None:
    def group(row_id: str, prompt: int, *lengths: int) -> TokenizedGroup:
        candidates = tuple((7,) * length for length in lengths)
        return TokenizedGroup(row_id=row_id, prompt_ids=(2,) * prompt, candidate_ids=candidates)

    groups = [group("short", 9, 30, 20), group("long", 80, 4, 3), group("longer", 500, 3, 3)]
    groups += [group(f"g{size}", 9, size, size) for size in (40, 41, 42)]

    def names(span: int) -> list[str]:
        return [some.row_id for some in telling_groups(groups, span)]

    assert names(0) == ["g42", "g41", "g40", "short"]
    assert names(60) == ["g42", "g41", "g40", "short", "long"]
    assert names(100) == ["g42", "g41", "g40", "short", "longer"]
    assert names(4096) == ["g42", "g41", "g40", "short"]


class LargestTensor(TorchDispatchMode):
    """Numbers in the largest tensor any operation returns, by dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.numel: dict[torch.dtype, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # pyright: ignore
        output = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                before = self.numel.get(tensor.dtype, 0)
                self.numel[tensor.dtype] = max(before, tensor.numel())
        return output


class WithoutTrimming(LlamaForCausalLM):
    """As models were before ``logits_to_keep``."""

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> object:  # pyright: ignore
        return super().forward(input_ids=input_ids, use_cache=use_cache)


def test_plain_logps_hold_few_logits() -> None:
    model = build_model().eval()
    whole = WithoutTrimming(copy.deepcopy(model.config)).eval()
    whole.load_state_dict(model.state_dict())
    group = TokenizedGroup(row_id="a", prompt_ids=(7,) * 100, candidate_ids=((9,) * 80, (8, 9)))
    found: list[list[torch.Tensor]] = []
    for of, num_rows in ((model, [81, 3]), (whole, [180, 102])):
        policy = Policy(of, head_impl="auto", autocast_dtype=None)
        rows: list[int] = []
        policy.model.get_output_embeddings().register_forward_hook(
            lambda _, __, output, rows=rows: rows.append(output.shape[-2])
        )
        with LargestTensor() as largest:
            found.append(plain_logps(policy, group, autocast_dtype=None))
        assert rows == num_rows
        assert largest.numel[torch.float64] == ROWS_PER_SLAB * 97
    for trimmed_L, whole_L, ids in zip(*found, group.candidate_ids, strict=True):
        assert trimmed_L.shape == (len(ids),)
        assert ((trimmed_L - whole_L).abs() <= float32_band(whole_L, torch.tensor(1.0))).all()


def test_the_reference_is_the_policy_before_the_first_step() -> None:
    policy = policy_of()
    gap = check_reference(policy, [BATCH], references_of(policy), beta=0.1, rounding=1e-5)
    assert gap == 0.0


@pytest.mark.parametrize("num_negatives", [1, 2, 3, 7])
def test_the_loss_begins_at_the_log_of_one_and_the_negatives(num_negatives: int) -> None:
    """Also where a pool is smaller than M."""
    policy = policy_of()
    references = references_of(policy)
    seen: list[torch.Tensor] = []

    def spy(scored: ScoredBatch) -> torch.Tensor:
        seen.append(mcpo(scored, LossConfig(beta=0.1)))
        return seen[-1]

    check_reference(
        policy,
        [BATCH],
        references,
        beta=0.1,
        rounding=1e-5,
        num_negatives=num_negatives,
        loss=spy,
    )
    expected = [math.log(2), math.log(1 + min(num_negatives, 3))]
    assert seen[0].tolist() == pytest.approx(expected, rel=8 * torch.finfo(torch.float32).eps)
    check_reference(
        policy, [BATCH], references, beta=0.1, rounding=1e-5, num_negatives=num_negatives
    )


def without_the_chosen(batch: ScoredBatch) -> torch.Tensor:
    return batch.negative_mask_PM.sum(dim=1).float().log()


@pytest.mark.parametrize(
    "loss", [partial(dpo, config=LossConfig(beta=0.1)), without_the_chosen], ids=["dpo", "wrong"]
)
def test_a_loss_that_begins_elsewhere_is_refused(
    loss: Callable[[ScoredBatch], torch.Tensor],
) -> None:
    policy = policy_of()
    check = partial(
        check_reference, policy, [BATCH], references_of(policy), beta=0.1, rounding=1e-5, loss=loss
    )
    with pytest.raises(ValueError, match=r"must be log\(1 \+ M\); row '[ab]'.*it is the loss func"):
        check(num_negatives=3)


def test_a_mean_over_pairs_begins_at_the_value_of_one_pair() -> None:
    policy = policy_of()
    check_reference(
        policy,
        [BATCH],
        references_of(policy),
        beta=0.1,
        rounding=1e-5,
        loss=partial(dpo, config=LossConfig(beta=0.1)),
    )


def test_a_reference_of_other_weights_is_refused() -> None:
    policy, other = policy_of(), policy_of(seed=1)
    with pytest.raises(ValueError, match=r"none of 2 rows agrees.*computed with other weights"):
        check_reference(policy, [BATCH], references_of(other), beta=0.1, rounding=1e-5)


def test_a_small_shift_is_refused_with_its_size() -> None:
    policy = policy_of()
    with pytest.raises(ValueError, match=r"row '[ab]' is off by 0\.010 nats \(0\.001 in reward\)"):
        check_reference(policy, [BATCH], references_of(policy, shift=0.01), beta=0.1, rounding=1e-5)


def test_a_reference_of_another_precision_is_named() -> None:
    policy, coarse = policy_of(), policy_of(torch.bfloat16)
    with pytest.raises(ValueError, match=r"in torch\.bfloat16 this model comes nearer"):
        check_reference(policy, [BATCH], references_of(coarse), beta=0.1, rounding=1e-5)
    assert policy.autocast_dtype is None
    with pytest.raises(ValueError, match=r"in torch\.float32 this model comes nearer"):
        check_reference(coarse, [BATCH], references_of(policy), beta=0.1, rounding=1e-6)


def test_a_damaged_cache_is_told_from_other_weights() -> None:
    policy = policy_of()
    references = references_of(policy, shift=0.5, only="b")
    with pytest.raises(ValueError, match=r"row 'b'.*1 of 2 rows agree, so it is not the weights"):
        check_reference(policy, [BATCH], references, beta=0.1, rounding=1e-5)
