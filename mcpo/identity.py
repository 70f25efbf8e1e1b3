"""What makes a run this run: all that a resumed run must share with the one it continues.

Weights and tokens count by content, not by the path they came from. What only cuts the work into
pieces (processes, engine, micro-batches, recompute, prefix sharing) does not count: it changes
rounding alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from mcpo.config import Config
from mcpo.engine import Engine
from mcpo.loop import groups_per_step
from mcpo.records import TokenizedGroup
from mcpo.reference import resolved_kind
from mcpo.tokens import token_hash

_POOLS = ("drop_top_k", "max_pool_size", "noise_candidate")
_ONLY_CUTS_THE_WORK = (
    "max_tokens_per_micro_batch",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
)
# A trained adapter counts among the weights, by content.
_ONLY_SAYS_WHERE = ("adapter_name_or_path", "merge_adapter")


def identity_of(
    engine: Engine, groups: Sequence[TokenizedGroup], config: Config, weights: str
) -> dict[str, Any]:
    """Flat and ready for JSON; ``weights`` is the hash of the reference's."""
    digest = hashlib.sha256()
    for group in groups:
        digest.update(f"{group.row_id}/{token_hash(group)}/{group.scores}".encode())
    options = asdict(config.kernel) | asdict(config.loss) | asdict(config.optim)
    options |= asdict(config.adapter) | asdict(config.reference)
    options["reference"] = resolved_kind(config)
    options["lora_target_modules"] = sorted(config.adapter.lora_target_modules)
    left_out = _ONLY_CUTS_THE_WORK + _ONLY_SAYS_WHERE
    return {
        "reference weights": weights,
        "training data": digest.hexdigest(),
        "compute dtype": str(engine.policy.autocast_dtype),
        "groups per step": groups_per_step(config.optim, engine.world_size),
        "seed": config.run.seed,
        # In the hash of the data too; named, so that a message says what to restore.
        **{name: getattr(config.data, name) for name in _POOLS},
        **{
            # As JSON gives a sequence back.
            name: list(value) if isinstance(value, tuple) else value
            for name, value in options.items()
            if name not in left_out
        },
    }


def differences(stored: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """What differs, each with both values, hashes cut short; empty if it is the same run."""
    return [
        f"{name} ({_short(stored.get(name))} then, {_short(current.get(name))} now)"
        for name in (*stored, *(name for name in current if name not in stored))
        if stored.get(name) != current.get(name)
    ]


def _short(value: Any) -> str:
    return str(value)[:12]
