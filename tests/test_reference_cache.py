from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from mcpo.pack import pack
from mcpo.records import TokenizedGroup
from mcpo.reference_cache import (
    cache_key,
    complete,
    read,
    unpack,
    verified,
    weights_hash,
)


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
    (path,) = tmp_path.iterdir()
    torn = path.read_text()[:-9]
    path.write_text(torn)
    scorer = Scorer()
    assert complete(tmp_path, BATCHES, scorer) == 1
    assert scorer.asked == [["c"]]
    assert len(read(tmp_path)) == 3
    # No file is ever written to again: the torn one is left as it is.
    assert path.read_text() == torn
    assert len(list(tmp_path.iterdir())) == 2


def test_a_broken_line_inside_is_an_error(tmp_path: Path) -> None:
    complete(tmp_path, BATCHES, Scorer())
    (path,) = tmp_path.iterdir()
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


def test_two_truncations_live_side_by_side(tmp_path: Path) -> None:
    long, short = [[group("a", (3, 4), (5, 6))]], [[group("a", (3,), (5,))]]
    assert [complete(tmp_path, one, Scorer()) for one in (long, short, long, short)] == [1, 1, 0, 0]
    assert verified(tmp_path, long[0]).logps["a"] == (-7 / 3, -11 / 3)
    assert verified(tmp_path, short[0]).logps["a"] == (-1.0, -5 / 3)


def test_where_two_passes_wrote_one_value_the_later_counts(tmp_path: Path) -> None:
    complete(tmp_path, [[GROUPS[0]]], Scorer())
    # Row b is missing, so the batch is scored whole and row a a second time.
    complete(tmp_path, BATCHES, lambda some: [[-9.0] * one.num_candidates for one in some])
    assert verified(tmp_path, GROUPS).logps["a"] == (-9.0, -9.0)


def test_a_run_that_starts_while_another_writes_shares_no_file_with_it(tmp_path: Path) -> None:
    """A line is larger than the writer's buffer, so part of one is on disk in between."""
    batches = [[group(name * 9000, (3, 4), (5,)) for name in "abc"]]

    class Interrupted(list[list[float]]):
        def __iter__(self) -> Iterator[list[float]]:
            for number, logps in enumerate(super().__iter__()):
                if number == 2:
                    assert complete(tmp_path, batches, Scorer()) == 1
                yield logps

    complete(tmp_path, batches, lambda some: Interrupted(Scorer()(some)))
    assert len(verified(tmp_path, batches[0]).logps) == 3
    assert len(list(tmp_path.iterdir())) == 2


def test_a_wrong_number_of_values_is_computed_again(tmp_path: Path) -> None:
    complete(tmp_path, BATCHES, Scorer())
    (path,) = tmp_path.iterdir()
    path.write_text(path.read_text().replace("-2.0, -5.0, -3.0", "-2.0, -5.0"))
    with pytest.raises(ValueError, match=r"row 'b' .* 3 log-probs, got 2 log-probs; delete the"):
        verified(tmp_path, GROUPS)
    assert complete(tmp_path, BATCHES, Scorer()) == 1
    assert verified(tmp_path, GROUPS).logps["b"] == (-2.0, -5.0, -3.0)


def test_ranks_share_the_batches_whoever_writes_first(tmp_path: Path) -> None:
    scorers = Scorer(), Scorer()
    for rank, scorer in enumerate(scorers):
        complete(tmp_path, BATCHES, scorer, rank=rank, world_size=2)
    assert [scorer.asked for scorer in scorers] == [[["a", "b"]], [["c"]]]
    assert len(verified(tmp_path, GROUPS).logps) == 3


@pytest.mark.parametrize(("first", "second"), [(2, 1), (1, 2)])
def test_a_cache_serves_any_number_of_processes(tmp_path: Path, first: int, second: int) -> None:
    for rank in range(first):
        complete(tmp_path, BATCHES, Scorer(), rank=rank, world_size=first)
    for rank in range(second):
        assert complete(tmp_path, BATCHES, Scorer(), rank=rank, world_size=second) == 0
    assert len(verified(tmp_path, GROUPS).logps) == 3


def test_a_machine_that_sees_its_own_values_alone_is_told_so(tmp_path: Path) -> None:
    for rank in range(2):
        complete(tmp_path / f"machine{rank}", BATCHES, Scorer(), rank=rank, world_size=2)
    message = "row 'c' .* on several machines, set reference_cache_dir to a folder of a file system"
    with pytest.raises(ValueError, match=message):
        verified(tmp_path / "machine0", GROUPS)


def test_key_changes_with_weights_and_settings() -> None:
    hashed = weights_hash({"w": torch.arange(4.0)})
    assert hashed == weights_hash({"w": torch.arange(4.0)})
    others = [{"w": torch.arange(4.0) + 1e-6}, {"w": torch.arange(4.0).view(2, 2)}]
    others += [{"v": torch.arange(4.0)}, {"w": torch.arange(4.0).view(torch.int32)}]
    for other in others:
        assert weights_hash(other) != hashed
    key = cache_key(hashed, {"dtype": "bf16"})
    assert key == cache_key(hashed, {"dtype": "bf16"})
    assert key != cache_key(hashed, {"dtype": "fp32"})
    assert key != cache_key(weights_hash(others[0]), {"dtype": "bf16"})
