"""Log-probabilities of all candidates under the frozen reference, computed once and kept on disk.

A cache is a folder of JSON-lines files under a key that covers everything a value depends on
besides its tokens: weights, precision, packing, head, reduction. A value is found by its row id and
the hash of its token ids, so another truncation, template or tokenizer is a miss, never a wrong
number, and several may live side by side. Every pass of every process writes a file of its own,
batch by batch: concurrent runs share a folder and never a file, an interrupted pass loses one
batch, and a torn last line is ignored. What all ranks wrote is read back from the folder by each,
so ranks on several machines need a folder on a file system they share.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mcpo.records import PackedBatch, TokenizedGroup
from mcpo.tokens import token_hash

FORMAT = 1

# Row id and token hash.
Key = tuple[str, str]
ScoreBatch = Callable[[Sequence[TokenizedGroup]], list[list[float]]]


@dataclass(frozen=True, kw_only=True, slots=True)
class ReferenceLogps:
    """Reference log-probabilities by row id."""

    logps: Mapping[str, tuple[float, ...]]
    """Of the candidates, then of the mismatched completion where a group has one."""

    def of(self, batch: PackedBatch) -> Tensor:
        """[P, C] float32 in the order of the batch; 0 where there is no candidate."""
        ref_logp_PC = torch.zeros(batch.mask_PC.shape, dtype=torch.float32)
        for prompt, row_id in enumerate(batch.row_ids):
            values = [self.logps[row_id][column] for column in batch.columns[prompt]]
            ref_logp_PC[prompt, : len(values)] = torch.tensor(values)
        return ref_logp_PC.to(batch.mask_PC.device)

    def with_mismatched(self, batch: PackedBatch) -> tuple[Tensor, Tensor | None]:
        """The same, and [P] float32 of mismatched completions; None for a batch without."""
        if batch.mismatched_P is None:
            return self.of(batch), None
        last_P = torch.tensor([self.logps[row_id][-1] for row_id in batch.row_ids])
        return self.of(batch), last_P.to(batch.mask_PC.device)


def weights_hash(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes, dtypes and bits of a model's weights."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def cache_key(weights: str, settings: Mapping[str, Any]) -> str:
    """Name of a cache: the hash of the reference weights, and of how they are evaluated."""
    described = json.dumps({"format": FORMAT, "weights": weights, **settings}, sort_keys=True)
    return hashlib.sha256(described.encode()).hexdigest()[:32]


def default_cache_dir() -> Path:
    """The user's cache folder for reference log-probabilities."""
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "mcpo" / "reference"


def read(folder: Path) -> dict[Key, tuple[float, ...]]:
    """Every value of a cache; where two passes computed the same one, the later pass's.

    Raises:
        ValueError: a line other than a torn last one cannot be read.
    """
    values: dict[Key, tuple[float, ...]] = {}
    # Names begin with the time, so sorting puts later passes behind earlier ones.
    for path in sorted(folder.glob("*.jsonl")):
        lines = path.read_bytes().split(b"\n")
        for number, line in enumerate(lines, start=1):
            if not line:
                continue
            try:
                row = json.loads(line)
                logps = tuple(float(logp) for logp in row["logps"])
                values[row["row_id"], row["token_hash"]] = logps
            except (ValueError, KeyError, TypeError) as error:
                if number == len(lines):
                    # A writer was killed in the middle of this line, or is still at it.
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
    path = folder / f"{time.time_ns()}-rank{rank}-{os.getpid()}.jsonl"
    # Refused if it is there: a file has one writer.
    with path.open("x") as file:
        for done, batch in enumerate(mine, start=1):
            for group, logps in zip(batch, score(batch), strict=True):
                row_id, hashed = _key(group)
                value = {"row_id": row_id, "token_hash": hashed, "logps": logps}
                file.write(json.dumps(value) + "\n")
            file.flush()
            os.fsync(file.fileno())
            if on_batch:
                on_batch(done)
    return len(mine)


def verified(folder: Path, groups: Sequence[TokenizedGroup]) -> ReferenceLogps:
    """Load the values of these groups, each checked against its tokens.

    Raises:
        ValueError: a group is absent, as where another machine wrote it to a folder of its own, was
            computed from other tokens, or has another number of candidates.
    """
    have = read(folder)
    logps: dict[str, tuple[float, ...]] = {}
    for group in groups:
        if not _present(group, have):
            raise ValueError(_absent(folder, group, have))
        logps[group.row_id] = have[_key(group)]
    return ReferenceLogps(logps=logps)


def unpack(
    logp_PC: Tensor, batch: PackedBatch, mismatched_P: Tensor | None = None
) -> list[list[float]]:
    """The log-probabilities of each prompt's candidates, as floats, without the padding.

    Those of mismatched completions go behind them.
    """
    counts = batch.mask_PC.sum(dim=1).tolist()
    rows = [row[:count] for row, count in zip(logp_PC.tolist(), counts, strict=True)]
    if mismatched_P is None:
        return rows
    return [[*row, last] for row, last in zip(rows, mismatched_P.tolist(), strict=True)]


def _key(group: TokenizedGroup) -> Key:
    return group.row_id, token_hash(group)


def _present(group: TokenizedGroup, have: Mapping[Key, tuple[float, ...]]) -> bool:
    return len(have.get(_key(group), ())) == len(group.scored_ids)


def _absent(folder: Path, group: TokenizedGroup, have: Mapping[Key, tuple[float, ...]]) -> str:
    """What is wrong with a cache that does not hold a group, and what to do."""
    row_id, wanted = _key(group)
    if (row_id, wanted) in have:
        got = f"{len(have[row_id, wanted])} log-probs; delete the folder"
    else:
        others = sum(known == row_id for known, _ in have)
        got = (
            f"none for these tokens and {others} for other tokens of the row; every process must "
            "read what all of them wrote: on several machines, set reference_cache_dir to a folder "
            "of a file system they share"
        )
    return (
        f"the reference cache {folder} must hold row {row_id!r} with its token hash and "
        f"{len(group.scored_ids)} log-probs, got {got}"
    )
