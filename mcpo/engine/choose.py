"""From options to an engine: which one, whether it can run here, and a policy placed on it."""

from __future__ import annotations

import importlib.util

import torch

from mcpo.config import Config, ScaleConfig
from mcpo.engine import Engine, launched_by_torchrun, world_size
from mcpo.engine.ddp import DDPEngine
from mcpo.engine.single import SingleEngine
from mcpo.optimizer import build_optimizer
from mcpo.policy import Policy
from mcpo.reference import resolved_kind

# What is not known of these: frozen weights, a second policy beside the one that is trained.
SHARDING = ("fsdp2", "deepspeed")
# Of these the weights are read by the first rank alone.
LOADED_ONCE = ("fsdp2",)


def engine_name(config: ScaleConfig) -> str:
    """The engine of this job: the one asked for, or by ``auto`` one with whole weights.

    Raises:
        ValueError: it needs other processes than there are.
        ModuleNotFoundError: its package is not installed.
    """
    launched = launched_by_torchrun()
    if config.engine == "auto":
        return "ddp" if launched else "single"
    if config.engine == "single" and world_size() > 1:
        raise ValueError(
            f"engine: single runs in one process, got {world_size()} of them; use ddp, fsdp2 or "
            "deepspeed"
        )
    if config.engine != "single" and not launched:
        raise ValueError(
            f"engine: {config.engine} needs the processes of a launcher, and the variables RANK "
            "and WORLD_SIZE are not set; start it with `torchrun --nproc-per-node N -m mcpo.train "
            "...`"
        )
    if config.engine == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        raise ModuleNotFoundError(
            "engine: deepspeed needs its package, which is not installed; run `pip install "
            "'mcpo[deepspeed]'`, or use engine: fsdp2, which shards as zero_stage 3 does"
        )
    return config.engine


def check_combination(config: Config, name: str) -> None:
    """Refuse what an engine that shards weights does not have yet.

    Raises:
        ValueError: adapters or a live reference with such an engine.
    """
    if name not in SHARDING:
        return
    wanted = {
        "adapters (use_peft, adapter_name_or_path)": config.adapter.adapts,
        "a live reference (reference: live, sync_ref_model)": resolved_kind(config) == "live",
    }
    found = [what for what, is_wanted in wanted.items() if is_wanted]
    if found:
        raise ValueError(
            f"engine: {name} needs all weights trained and a precomputed reference, got "
            f"{' and '.join(found)}; use engine: ddp"
        )


def bytes_per_parameter(config: ScaleConfig, name: str, num_ranks: int) -> float:
    """What a process holds of a trained float32 parameter, its gradient and its two moments.

    Counted between the phases of a step, and on the device: what is gathered for a phase comes on
    top, what is offloaded does not.
    """
    sharded = {"fsdp2": 3, "deepspeed": config.zero_stage}.get(name, 0)
    moments = 8 / num_ranks if sharded >= 1 else 8
    gradient = 4 / num_ranks if sharded >= 2 and not config.whole_gradients else 4
    weight = 4 / num_ranks if sharded >= 3 else 4
    if config.offload:
        # Of ZeRO the moments and a second set of float32 weights; in stage 3 also the weights.
        moments, weight = 0, 0 if sharded >= 3 else weight
    return moments + gradient + weight


def make_engine(name: str, policy: Policy, config: Config, device: torch.device) -> Engine:
    """The engine of that name on this device, with the policy and its optimizer.

    Raises:
        ValueError: the policy cannot be run by it.
    """
    if name in SHARDING:
        _require_all_trained(name, policy)
    if name == "fsdp2":
        from mcpo.engine.fsdp2 import FSDP2Engine
        from mcpo.engine.sharding import shard

        shard(policy.train(), device)
        optimizer = build_optimizer(policy, config.optim)
        return FSDP2Engine(policy, optimizer, device, whole_gradients=config.scale.whole_gradients)
    if name == "deepspeed":
        from mcpo.engine.zero import ZeroEngine

        # Before its weights are sharded, while they show what is a matrix.
        optimizer = build_optimizer(policy.train(), config.optim)
        return ZeroEngine(policy, optimizer, device, config.scale)
    policy.to(device).train()
    optimizer = build_optimizer(policy, config.optim)
    if name == "ddp":
        return DDPEngine(policy, optimizer, device)
    return SingleEngine(policy, optimizer, device)


def _require_all_trained(name: str, policy: Policy) -> None:
    frozen = [key for key, weight in policy.named_parameters() if not weight.requires_grad]
    if frozen:
        raise ValueError(
            f"engine: {name} trains every weight, and {len(frozen)} are frozen, such as "
            f"{frozen[0]}, as under adapters; use engine: ddp"
        )
