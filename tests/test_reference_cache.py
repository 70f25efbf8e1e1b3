from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from mcpo.pack import pack
from mcpo.records import TokenizedGroup
from mcpo.reference_cache import cache_key, complete, read, unpack, verified


def group(row_id: str, *candidates: tuple[int, ...]) -> TokenizedGroup:
    return TokenizedGroup(row_id=row_id, prompt_ids=(1, 2), candidate_ids=candidates)


GROUPS = [group("a", (3, 4), (5,)), group("b", (6,), (7, 8), (9,)), group("c", (3,), (4,))]
BATCHES = [GROUPS[:2], GROUPS[2:]]


class Scorer:
    """Stands in for the policy: a value per candidate, and a record of what was asked."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def __call__(self, groups: Sequence[TokenizedGroup]) -> list[list[float]]:
        self.asked.append([group.row_id for group in groups])
        return [[-sum(ids) / 3 for ids in group.candidate_ids] for group in groups]


def test_values_come_back_bit_for_bit_and_are_computed_once(tmp_path: Path) -> None:
    scorer = Scorer()
    assert complete(tmp_path, BATCHES, scorer) == 2
    references = verified(tmp_path, GROUPS)
    assert references.logps["b"] == (-6 / 3, -15 / 3, -9 / 3)
    assert complete(tmp_path, BATCHES, scorer) == 0
    assert scorer.asked == [["a", "b"], ["c"]]


def test_values_fill_the_columns_of_a_batch(tmp_path: Path) -> None:
    complete(tmp_path, BATCHES, Scorer())
    batch = pack([GROUPS[1], GROUPS[0]], share_prefix=True)
    ref = verified(tmp_path, GROUPS).of(batch)
    expected = torch.tensor([[-2.0, -5.0, -3.0], [-7 / 3, -5 / 3, 0.0]])
    assert torch.equal(ref, expected)
    assert unpack(ref, batch) == [[-2.0, -5.0, -3.0], ref[1, :2].tolist()]


def test_an_interrupted_pass_goes_on_with_the_same_batches(tmp_path: Path) -> None:
    class Interrupted(Scorer):
        def __call__(self, groups: Sequence[TokenizedGroup]) -> list[list[float]]:
            if self.asked:
                raise KeyboardInterrupt
            return super().__call__(groups)

    with pytest.raises(KeyboardInterrupt):
        complete(tmp_path, BATCHES, Interrupted())
    scorer = Scorer()
    assert complete(tmp_path, BATCHES, scorer) == 1
    assert scorer.asked == [["c"]]
    verified(tmp_path, GROUPS)


def test_a_torn_last_line_counts_as_not_written(tmp_path: Path) -> None:
    complete(tmp_path, BATCHES, Scorer())
    path = tmp_path / "rank0.jsonl"
    path.write_text(path.read_text()[:-9])
    scorer = Scorer()
    assert complete(tmp_path, BATCHES, scorer) == 1
    assert scorer.asked == [["c"]]
    assert len(read(tmp_path)) == 3
    assert all(line.endswith("}") for line in path.read_text().splitlines())


def test_a_broken_line_inside_is_an_error(tmp_path: Path) -> None:
    complete(tmp_path, BATCHES, Scorer())
    path = tmp_path / "rank0.jsonl"
    path.write_text("{broken\n" + path.read_text())
    with pytest.raises(ValueError, match="line 1, must hold row_id, token_hash and logps"):
        read(tmp_path)


def test_other_tokens_are_a_miss_and_never_a_wrong_number(tmp_path: Path) -> None:
    complete(tmp_path, BATCHES, Scorer())
    truncated = group("a", (3,), (5,))
    with pytest.raises(ValueError, match="must hold row 'a' with its token hash"):
        verified(tmp_path, [truncated])
    scorer = Scorer()
    complete(tmp_path, [[truncated], GROUPS[1:]], scorer)
    assert scorer.asked == [["a"]]
    assert verified(tmp_path, [truncated]).logps["a"] == (-1.0, -5 / 3)


def test_ranks_share_the_batches_whoever_writes_first(tmp_path: Path) -> None:
    scorers = Scorer(), Scorer()
    for rank, scorer in enumerate(scorers):
        complete(tmp_path, BATCHES, scorer, rank=rank, world_size=2)
    assert [scorer.asked for scorer in scorers] == [[["a", "b"]], [["c"]]]
    assert len(verified(tmp_path, GROUPS).logps) == 3


def test_key_changes_with_weights_and_settings() -> None:
    weights = {"w": torch.arange(4.0)}
    key = cache_key(weights, {"dtype": "bf16"})
    assert key == cache_key({"w": torch.arange(4.0)}, {"dtype": "bf16"})
    assert key != cache_key({"w": torch.arange(4.0) + 1e-6}, {"dtype": "bf16"})
    assert key != cache_key({"w": torch.arange(4.0).view(2, 2)}, {"dtype": "bf16"})
    assert key != cache_key(weights, {"dtype": "fp32"})
