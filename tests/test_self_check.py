from __future__ import annotations

import pytest
import torch
from conftest import build_model

from mcpo.pack import pack
from mcpo.policy import Policy, group_logps
from mcpo.records import TokenizedGroup
from mcpo.reference_cache import ReferenceLogps, unpack
from mcpo.self_check import check_packing, check_reference

GROUPS = [
    TokenizedGroup(row_id="a", prompt_ids=(2, 10, 11, 12), candidate_ids=((20, 21, 3), (22, 3))),
    TokenizedGroup(row_id="b", prompt_ids=(2, 13), candidate_ids=((30, 31, 32, 3), (34, 3))),
]
BATCH = pack(GROUPS, share_prefix=True)


def policy_of(autocast_dtype: torch.dtype | None = None) -> Policy:
    return Policy(build_model().eval(), head_impl="auto", autocast_dtype=autocast_dtype)


def references_of(policy: Policy, shift: float = 0.0) -> ReferenceLogps:
    with torch.no_grad():
        logps = unpack(group_logps(policy(BATCH), BATCH), BATCH)
    return ReferenceLogps(
        logps={
            group.row_id: tuple(logp + shift for logp in row)
            for group, row in zip(GROUPS, logps, strict=True)
        }
    )


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("share_prefix", [True, False], ids=["shared", "separate"])
def test_a_followed_layout_passes(dtype: torch.dtype | None, share_prefix: bool) -> None:
    rounding = check_packing(policy_of(dtype), GROUPS[0], share_prefix=share_prefix)
    assert 0 < rounding < (1e-3 if dtype is None else 1.0)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_model_that_mixes_tokens_outside_attention_is_refused(dtype: torch.dtype | None) -> None:
    """Stands for linear-attention hybrids, whose state runs on from one segment to the next."""
    policy = policy_of(dtype)
    layer = policy.model.model.layers[0]
    layer.register_forward_hook(
        lambda _, __, output: output + 3.0 * torch.nn.functional.pad(output, (0, 0, 1, 0))[:, :-1]
    )
    with pytest.raises(ValueError, match="LlamaForCausalLM must give the same log-probabilities"):
        check_packing(policy, GROUPS[0], share_prefix=True)


def test_the_reference_is_the_policy_before_the_first_step() -> None:
    policy = policy_of()
    gap = check_reference(policy, [BATCH], references_of(policy), beta=0.1, rounding=1e-5)
    assert gap == 0.0


def test_a_reference_of_other_weights_is_refused() -> None:
    policy = policy_of()
    with pytest.raises(ValueError, match=r"row 'a' is off by 0\.010 nats \(0\.001 in reward\)"):
        check_reference(policy, [BATCH], references_of(policy, shift=0.01), beta=0.1, rounding=1e-5)
