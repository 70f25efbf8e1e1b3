"""Which weights of a policy are gathered together, and how they get to all ranks.

Groups, each whole while its modules run: every layer; the embedding; the head; what is left of the
body, such as the last norm. An embedding that is tied to the head is one group with it, whole from
the first layer to the head. Under autocast layers and an untied head are gathered in its type, and
so are their gradients, which are summed in float32; embeddings and last norm stay float32, as the
residual stream does. Policy and model hold no weights of their own: they are roots, so that
a packed forward, which goes through the policy, and a plain one, which goes through the model, find
the same groups.

Weights start on rank 0. Group by group they are sent to all ranks and cut into shards, so no other
rank ever holds more than a group of them, and the other ranks may begin with a model on the device
"meta".
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from transformers.modeling_layers import GradientCheckpointingLayer

from mcpo.policy import Policy
from mcpo_kernels.integrations.packable import text_decoder

Holders = dict[nn.Parameter, list[tuple[nn.Module, str]]]


def shard(policy: Policy, device: torch.device) -> None:
    """Shard a policy in place over all ranks; rank 0 has its weights, of others none are read.

    Raises:
        ValueError: it has no layers to shard one by one.
    """
    layers = [
        module
        for module in policy.model.modules()
        if isinstance(module, GradientCheckpointingLayer)
    ]
    if not layers:
        raise ValueError(
            f"the layers of {type(policy.model).__name__} must be transformers' "
            "GradientCheckpointingLayers to be sharded one by one, and it has none; use engine: ddp"
        )
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    _share_buffers(policy, device)
    holders = _holders(policy)
    embedding = policy.model.get_input_embeddings()
    head = policy.model.get_output_embeddings()
    assert isinstance(embedding, nn.Module)
    assert isinstance(head, nn.Module)
    tied = embedding.weight is head.weight
    # What products cast to bf16 in each use may as well be cast before it is sent.
    cast = MixedPrecisionPolicy(
        param_dtype=policy.autocast_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for layer in layers:
        _shard_group([layer], mesh, holders, device, precision=cast)
    # The backward follows the head at once: between them it stays whole.
    if tied:
        _shard_group([embedding, head], mesh, holders, device, reshard_after_forward=False)
    else:
        _shard_group([embedding], mesh, holders, device)
        _shard_group([head], mesh, holders, device, reshard_after_forward=False, precision=cast)
        # The gradient of a look-up does not depend on the table.
        assert isinstance(embedding, FSDPModule)
        embedding.set_unshard_in_backward(False)
    for module in dict.fromkeys([text_decoder(policy.model), policy.model, policy]):
        _shard_group([module], mesh, holders, device)
    _make_root(policy)


def _make_root(policy: Policy) -> None:
    """FSDP2 takes for the root what runs first, and the checks at the start run parts alone."""
    # Of any type, as a module's type knows of no attribute that is a function.
    root: Any = policy
    root.run_first = lambda: None
    register_fsdp_forward_method(policy, "run_first")
    root.run_first()
    del root.run_first


def _shard_group(
    modules: list[nn.Module],
    mesh: DeviceMesh,
    holders: Holders,
    device: torch.device,
    *,
    reshard_after_forward: bool = True,
    precision: MixedPrecisionPolicy | None = None,
) -> None:
    """Send the weights of one group to all ranks, then keep a shard of each."""
    _receive(modules, holders, device)
    fully_shard(
        modules if len(modules) > 1 else modules[0],
        mesh=mesh,
        reshard_after_forward=reshard_after_forward,
        mp_policy=precision or MixedPrecisionPolicy(),
    )


def _receive(modules: Iterable[nn.Module], holders: Holders, device: torch.device) -> None:
    """Put rank 0's values of the modules' unsharded weights on every rank's device."""
    weights = dict.fromkeys(weight for module in modules for weight in module.parameters())
    for weight in weights:
        if isinstance(weight, DTensor):
            continue
        value = nn.Parameter(
            _on_device(weight.detach(), device), requires_grad=weight.requires_grad
        )
        dist.broadcast(value.detach(), src=0)
        for module, name in holders[weight]:
            setattr(module, name, value)


def _share_buffers(policy: Policy, device: torch.device) -> None:
    """Also those that no state dict has, such as rotary frequencies: they are small."""
    for module in policy.modules():
        for name, buffer in module.named_buffers(recurse=False):
            value = _on_device(buffer, device)
            dist.broadcast(value, src=0)
            setattr(module, name, value)


def _on_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The values where there are any, else room for them."""
    return torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device)


def _holders(policy: Policy) -> Holders:
    """Where each weight is registered; tied ones in several places."""
    found: Holders = {}
    for module in policy.modules():
        for name, weight in module.named_parameters(recurse=False):
            found.setdefault(weight, []).append((module, name))
    return found
