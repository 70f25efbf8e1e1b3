"""Log-probabilities of all candidates under the frozen reference, computed once and kept on disk.

A cache is a folder of JSON-lines files, one per writer, under a key that covers everything a value
depends on besides its tokens: weights, precision, packing, head, reduction. A value carries its row
id and the hash of its token ids, so another truncation, template or tokenizer is a miss, never a
wrong number. Lines are appended batch by batch: an interrupted pass loses one batch, and a torn
last line is ignored.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mcpo.records import PackedBatch, TokenizedGroup
from mcpo.tokens import token_hash

FORMAT = 1

ScoreBatch = Callable[[Sequence[TokenizedGroup]], list[list[float]]]


@dataclass(frozen=True, kw_only=True, slots=True)
class ReferenceLogps:
    """Reference log-probabilities by row id."""

    logps: Mapping[str, tuple[float, ...]]

    def of(self, batch: PackedBatch) -> Tensor:
        """[P, C] float32 in the order of the batch; 0 where there is no candidate."""
        ref_logp_PC = torch.zeros(batch.mask_PC.shape, dtype=torch.float32)
        for prompt, row_id in enumerate(batch.row_ids):
            values = self.logps[row_id]
            ref_logp_PC[prompt, : len(values)] = torch.tensor(values)
        return ref_logp_PC.to(batch.mask_PC.device)


def cache_key(state: Mapping[str, Tensor], settings: Mapping[str, Any]) -> str:
    """Name of a cache: hash of the reference weights and of how they are evaluated."""
    digest = hashlib.sha256(json.dumps({"format": FORMAT, **settings}, sort_keys=True).encode())
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def default_cache_dir() -> Path:
    """The user's cache folder for reference log-probabilities."""
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "mcpo" / "reference"


def read(folder: Path) -> dict[str, tuple[str, tuple[float, ...]]]:
    """Every value of a cache: row id -> (token hash, log-probabilities).

    Raises:
        ValueError: a line other than a torn last one cannot be read.
    """
    values: dict[str, tuple[str, tuple[float, ...]]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        lines = path.read_text().split("\n")
        for number, line in enumerate(lines, start=1):
            if not line:
                continue
            try:
                row = json.loads(line)
                values[row["row_id"]] = (row["token_hash"], tuple(row["logps"]))
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                if number == len(lines):
                    # A writer was killed in the middle of this line: it counts as not written.
                    continue
                raise ValueError(
                    f"{path}, line {number}, must hold row_id, token_hash and logps, got "
                    f"{line[:60]!r}; delete {folder} to compute the reference again"
                ) from error
    return values


def complete(
    folder: Path,
    batches: Sequence[Sequence[TokenizedGroup]],
    score: ScoreBatch,
    *,
    rank: int = 0,
    world_size: int = 1,
    on_batch: Callable[[int], None] | None = None,
) -> int:
    """Compute what is missing from a cache, this rank its share of the batches; return batches
    computed.

    A batch with any missing row is scored whole, in the composition it always has, so that an
    interrupted and resumed pass gives the bits of an undisturbed one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    have = read(folder)
    # Shared out before looking at what is missing: another rank may be writing by now.
    share = batches[rank::world_size]
    mine = [batch for batch in share if not all(_present(group, have) for group in batch)]
    if not mine:
        return 0
    path = folder / f"rank{rank}.jsonl"
    _drop_torn_line(path)
    with path.open("a") as file:
        for done, batch in enumerate(mine, start=1):
            for group, logps in zip(batch, score(batch), strict=True):
                value = {"row_id": group.row_id, "token_hash": token_hash(group), "logps": logps}
                file.write(json.dumps(value) + "\n")
            file.flush()
            os.fsync(file.fileno())
            if on_batch:
                on_batch(done)
    return len(mine)


def verified(folder: Path, groups: Sequence[TokenizedGroup]) -> ReferenceLogps:
    """Load the values of these groups, each checked against its tokens.

    Raises:
        ValueError: a group is absent, was computed from other tokens, or has another number of
            candidates.
    """
    have = read(folder)
    for group in groups:
        if not _present(group, have):
            raise ValueError(
                f"the reference cache {folder} must hold row {group.row_id!r} with its token hash "
                f"and {group.num_candidates} log-probs, got {have.get(group.row_id)!r}; "
                "delete the folder"
            )
    return ReferenceLogps(logps={group.row_id: have[group.row_id][1] for group in groups})


def unpack(logp_PC: Tensor, batch: PackedBatch) -> list[list[float]]:
    """The log-probabilities of each prompt's candidates, as floats, without the padding."""
    counts = batch.mask_PC.sum(dim=1).tolist()
    return [row[:count] for row, count in zip(logp_PC.tolist(), counts, strict=True)]


def _present(group: TokenizedGroup, have: Mapping[str, tuple[str, tuple[float, ...]]]) -> bool:
    if group.row_id not in have:
        return False
    stored_hash, logps = have[group.row_id]
    return stored_hash == token_hash(group) and len(logps) == group.num_candidates


def _drop_torn_line(path: Path) -> None:
    """Cut what a killed writer left after the last full line, so that appending is safe."""
    if path.exists():
        content = path.read_bytes()
        with path.open("r+b") as file:
            file.truncate(content.rfind(b"\n") + 1)
