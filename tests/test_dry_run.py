from __future__ import annotations

import torch
from conftest import build_model

from mcpo.dry_run import without_weights
from mcpo.pack import pack
from mcpo.policy import Policy
from mcpo.recompute import activation_bytes
from mcpo.records import TokenizedGroup


def test_parameters_are_counted_once_without_weights() -> None:
    for tied in (True, False):
        model = build_model(tied=tied)
        expected = sum(parameter.numel() for parameter in model.parameters())
        assert without_weights(model.config).num_parameters() == expected


def test_estimate_of_activations_is_of_the_right_size() -> None:
    """Against the bytes autograd really keeps in the body, within a factor of two."""
    model = build_model()
    policy = Policy(model.train(), head_impl="auto", autocast_dtype=None)
    group = TokenizedGroup(
        row_id="a", prompt_ids=(2, *range(10, 40)), candidate_ids=(tuple(range(40, 90)),) * 3
    )
    batch = pack([group], share_prefix=True)
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        policy.scored_hidden(batch)
    # The estimate is for bf16 products; in float32 those parts are twice as large.
    estimate = activation_bytes(model.config, batch.layout.num_tokens, "none")
    assert estimate / 2 < sum(kept.values()) < 3 * estimate
