"""Held-out prompts with checks, decoded greedily by the policy before and after training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console

from mcpo.config import RunConfig
from mcpo.encode import Encoder, encode_prompt
from mcpo.engine import Engine
from mcpo.evaluate.generate import Completion, greedy
from mcpo.evaluate.verifiable import VerifiableItem
from mcpo.policy import unpacked
from mcpo.progress import progress


def decode(
    engine: Engine,
    encoder: Encoder,
    items: Sequence[VerifiableItem],
    config: RunConfig,
    console: Console,
    *,
    name: str,
) -> list[Completion]:
    """Answer every item, ranks sharing them, and keep the answers in ``heldout_<name>.jsonl``.

    Prompts become tokens, and answers end, as ``encoder`` has them in training.

    Returns:
        The completions of all items in their order, on every rank.
    """
    policy = engine.policy
    mine = items[engine.rank :: engine.world_size]
    with (
        progress(console, f"answers {name}", len(mine), quiet=engine.rank != 0) as advance,
        engine.together(),
        unpacked(policy) as model,
        torch.autocast(
            engine.device.type,
            dtype=policy.autocast_dtype,
            enabled=policy.autocast_dtype is not None,
        ),
    ):
        completions = greedy(
            model,
            encoder,
            [encode_prompt(item.prompt, encoder, item.item_id) for item in mine],
            max_new_tokens=config.heldout_max_new_tokens,
            batch_size=config.heldout_batch_size,
            on_progress=lambda count: advance(count, ""),
        )
    shares = engine.gather(completions)
    every = [
        shares[index % engine.world_size][index // engine.world_size] for index in range(len(items))
    ]
    if engine.rank == 0:
        _write(Path(config.output_dir) / f"heldout_{name}.jsonl", items, every)
    return every


def decode_once(
    engine: Engine,
    encoder: Encoder,
    items: Sequence[VerifiableItem],
    config: RunConfig,
    console: Console,
    *,
    name: str,
) -> list[Completion]:
    """``decode``, or what an earlier start of this run wrote."""
    path = Path(config.output_dir) / f"heldout_{name}.jsonl"
    if not all(engine.gather(path.is_file())):
        return decode(engine, encoder, items, config, console, name=name)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if [row.pop("id") for row in rows] != [item.item_id for item in items]:
        raise ValueError(
            f"{path} must hold an answer to every held-out prompt, and holds others; restore "
            "heldout_prompts, or start anew in another output_dir"
        )
    return [Completion(**row) for row in rows]


def _write(path: Path, items: Sequence[VerifiableItem], completions: Sequence[Completion]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".tmp")
    with scratch.open("w", encoding="utf-8") as file:
        for item, completion in zip(items, completions, strict=True):
            file.write(json.dumps({"id": item.item_id, **asdict(completion)}) + "\n")
    scratch.replace(path)
