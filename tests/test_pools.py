"""Pools made smaller, noisier or fixed: what is left is a function of seed and row id."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conftest import WORDS, candidate_lines, write_jsonl
from transformers import PreTrainedTokenizerBase

from mcpo.config import DataConfig, KernelConfig
from mcpo.data.mixture import parse_source
from mcpo.data.rows import RowOptions, load_rows
from mcpo.findings import counts
from mcpo.pack import pack
from mcpo.prepare import Groups, load_groups
from mcpo.records import TokenizedGroup
from mcpo.static_negatives import fix_negatives
from mcpo.switched import with_two_switched

STATIC = KernelConfig(sampling="static", strategy="random")


def ranked_file(folder: Path, *, key: str = "rank", rows: int = 30, pool: int = 6) -> Path:
    """Texts say their place: ``w10`` is chosen, ``w11`` the best of the pool."""
    sign = 1 if key == "rank" else -1
    lines = [
        {
            "id": f"row-{number}",
            "prompt": f"w{number}",
            "completions": [
                {"text": WORDS[10 + place] + " w1 w2", key: sign * (place + 1)}
                for place in (3, 0, 5, 1, 6, 2, 4)[: pool + 1]
            ],
        }
        for number in range(rows)
    ]
    return write_jsonl(folder / f"{key}.jsonl", lines)


def pools(path: Path, seed: int = 0, **options: Any) -> list[list[int]]:
    """Places of each pool, 1 for the best."""
    rows = load_rows([str(path)], options=RowOptions(**options), seed=seed).rows
    return [[int(one.text.split()[0][1:]) - 10 for one in row.pool] for row in rows]


def load(
    tokenizer: PreTrainedTokenizerBase,
    train: Path,
    held_out: Path | None = None,
    *,
    seed: int = 0,
    kernel: KernelConfig | None = None,
    **options: Any,
) -> Groups:
    config = DataConfig(
        train_data=(parse_source(str(train)),),
        eval_data=(parse_source(str(held_out)),) if held_out else (),
        **options,
    )
    return load_groups(config, tokenizer, seed, kernel)


# Dropping and limiting.


@pytest.mark.parametrize("key", ["rank", "score"])
def test_the_best_ranked_are_dropped(tmp_path: Path, key: str) -> None:
    path = ranked_file(tmp_path, key=key)
    assert {tuple(sorted(pool)) for pool in pools(path, drop_top_k=2)} == {(3, 4, 5, 6)}
    found = load_rows([str(path)], options=RowOptions(drop_top_k=2)).findings
    assert counts(found) == {"top_ranked": 60}


def test_a_limit_keeps_a_sample_that_a_larger_limit_contains(tmp_path: Path) -> None:
    path = ranked_file(tmp_path, rows=600)
    two, four = pools(path, max_pool_size=2), pools(path, max_pool_size=4)
    assert {len(pool) for pool in two} == {2}
    assert all(set(small) < set(large) for small, large in zip(two, four, strict=True))
    # Every candidate is as likely: each count is binomial, with a deviation of 11.5.
    for place, count in Counter(itertools.chain(*two)).items():
        assert abs(count - 200) < 5 * 11.6, place
    assert pools(path, max_pool_size=2) == two
    assert pools(path, seed=1, max_pool_size=2) != two
    assert pools(path, max_pool_size=6) == pools(path)
    found = load_rows([str(path)], options=RowOptions(max_pool_size=4)).findings
    assert counts(found) == {"over_pool_size": 1200}


def test_a_row_keeps_the_same_candidates_wherever_it_stands(tmp_path: Path) -> None:
    path = ranked_file(tmp_path)
    lines = path.read_text().splitlines(keepends=True)
    backwards = tmp_path / "backwards.jsonl"
    backwards.write_text("".join(lines[::-1]))
    assert pools(backwards, max_pool_size=3) == pools(path, max_pool_size=3)[::-1]


def test_a_row_whose_pool_is_used_up_is_dropped_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "mixed.jsonl"
    small, large = (ranked_file(tmp_path, rows=2, pool=size).read_text() for size in (1, 6))
    path.write_text(small + large)
    report = load_rows([str(path)], options=RowOptions(drop_top_k=1))
    assert [row.row_id for row in report.rows] == ["row-0#2", "row-1#2"]
    assert counts(report.findings)["empty_pool"] == 2


def test_a_pool_without_order_has_no_best(tmp_path: Path) -> None:
    line: dict[str, object] = {"id": "a", "prompt": "p", "chosen": "w1", "rejected": ["w2", "w3"]}
    path = write_jsonl(tmp_path / "pairs.jsonl", [line])
    with pytest.raises(ValueError, match="row 'a': drop_top_k needs a pool that is ranked or scor"):
        load_rows([str(path)], options=RowOptions(drop_top_k=1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drop_top_k": -1}, "drop_top_k must be 0 or more, got -1"),
        ({"max_pool_size": 0}, "max_pool_size must be at least 1, got 0"),
    ],
)
def test_limits_are_checked_where_they_are_given(options: dict[str, Any], message: str) -> None:
    for config in (RowOptions, DataConfig):
        with pytest.raises(ValueError, match=message):
            config(**options)


# Noise.


def test_every_pair_of_unequal_tokens_is_switched_as_often() -> None:
    ids = (7, 8, 7, 9)
    # All pairs of places but the two sevens.
    pairs = [pair for pair in itertools.combinations(range(4), 2) if pair != (0, 2)]
    expected = set()
    for first, second in pairs:
        switched = list(ids)
        switched[first], switched[second] = ids[second], ids[first]
        expected.add(tuple(switched))
    seen = Counter(with_two_switched(ids, f"0/noise/{number}") for number in range(2000))
    assert set(seen) == expected
    assert len(expected) == 5
    chi_squared = sum((count - 400) ** 2 / 400 for count in seen.values())
    # The 1 - 1e-6 quantile with 4 degrees of freedom.
    assert chi_squared < 33.4


@pytest.mark.parametrize("ids", [(), (4,), (4, 4, 4)])
def test_equal_tokens_cannot_be_switched(ids: tuple[int, ...]) -> None:
    assert with_two_switched(ids, "name") is None


def noisy_rows(folder: Path) -> Path:
    lines: list[dict[str, object]] = [
        {"id": "a", "prompt": "w1", "chosen": "w1 w2 w3 w4", "rejected": ["w5", "w6 w7"]},
        {"id": "b", "prompt": "w2", "chosen": "w1", "rejected": "w5"},
        # Cut to three tokens, the end token with them.
        {"id": "c", "prompt": "w3", "chosen": "w1 w2 " * 200, "rejected": "w9"},
        # Its noise is the rival that it has.
        {"id": "d", "prompt": "w4", "chosen": "w1 w2", "rejected": "w2 w1"},
    ]
    return write_jsonl(folder / "noisy.jsonl", lines)


def test_the_noise_candidate_is_the_chosen_one_with_two_tokens_switched(
    tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    path = noisy_rows(tmp_path)
    plain = load(tiny_tokenizer, path, max_length=12).train
    groups = load(tiny_tokenizer, path, max_length=12, noise_candidate="add")
    a, b, c, d = groups.train
    for noisy, before in ((a, plain[0]), (c, plain[2])):
        assert noisy.candidate_ids[:-1] == before.candidate_ids
        chosen, noise = noisy.candidate_ids[0], noisy.candidate_ids[-1]
        assert sorted(noise) == sorted(chosen)
        assert sum(one != other for one, other in zip(noise, chosen, strict=True)) == 2
    assert a.candidate_ids[-1][-1] == tiny_tokenizer.eos_token_id
    assert c.candidate_ids[0][-1] != tiny_tokenizer.eos_token_id
    assert (b, d) == (plain[1], plain[3])
    assert "no_noise_candidate 1 (row b)" in groups.report
    assert "same_as_rival 1 (row d)" in groups.report
    again = load(tiny_tokenizer, path, max_length=12, noise_candidate="add").train
    assert again == groups.train
    others = {load(tiny_tokenizer, path, seed=s, noise_candidate="add").train[0] for s in range(5)}
    assert len(others) > 1


def test_noise_alone_is_the_whole_pool(
    tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    groups = load(tiny_tokenizer, noisy_rows(tmp_path), noise_candidate="only").train
    assert [group.row_id for group in groups] == ["a", "c", "d"]
    assert all(group.num_candidates == 2 for group in groups)
    assert all(sorted(g.candidate_ids[1]) == sorted(g.candidate_ids[0]) for g in groups)
    with pytest.raises(ValueError, match="noise_candidate: only replaces the pool"):
        DataConfig(noise_candidate="only", max_pool_size=2)


def test_held_out_pools_stay_as_they_are(
    tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    train = ranked_file(tmp_path)
    held = write_jsonl(tmp_path / "held.jsonl", candidate_lines(5, seed=1, prefix="held"))
    plain = load(tiny_tokenizer, train, held)
    changed = load(
        tiny_tokenizer,
        train,
        held,
        kernel=STATIC,
        drop_top_k=1,
        max_pool_size=3,
        noise_candidate="add",
    )
    assert changed.held_out == plain.held_out
    assert changed.train != plain.train


# Scores of the rows.


def test_scores_stay_with_their_candidates(
    tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    completions = [
        {"text": "w1 w2", "score": 9},
        {"text": "w3 " * 300, "score": 8},
        {"text": "", "score": 7},
        {"text": "w4", "score": 6},
        {"text": "w1 w2", "score": 5},
        {"text": "w5", "score": 4},
    ]
    line: dict[str, object] = {"id": "a", "prompt": "w1", "completions": completions}
    path = write_jsonl(tmp_path / "scored.jsonl", [line])
    (group,) = load(tiny_tokenizer, path, max_length=20, too_long="drop").train
    assert group.scores == (9.0, 6.0, 4.0)
    (noisy,) = load(
        tiny_tokenizer, path, max_length=20, too_long="drop", noise_candidate="add"
    ).train
    assert noisy.scores == (9.0, 6.0, 4.0, None)
    batch = pack([group.only((0, 2)), group, noisy], share_prefix=True)
    assert batch.columns == ((0, 2), (0, 1, 2), (0, 1, 2, 3))
    assert batch.external_score_PC[:2, :3].nan_to_num(-1).tolist() == [[9, 4, -1], [9, 6, 4]]
    assert batch.external_score_PC[2].nan_to_num(-1).tolist() == [9, 6, 4, -1]


def test_rows_without_scores_cannot_be_drawn_by_them(
    tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    kernel = KernelConfig(score="external")
    ranked = ranked_file(tmp_path)
    with pytest.raises(ValueError, match=r"row 'row-0' has none for 6 of 6 \(ranks are no scores"):
        load(tiny_tokenizer, ranked, kernel=kernel)
    scored = ranked_file(tmp_path, key="score")
    assert load(tiny_tokenizer, scored, kernel=kernel).train[0].scores[0] == -1.0
    with pytest.raises(ValueError, match=r"score: external needs .* 'row-0' has none for 1 of 7"):
        load(tiny_tokenizer, scored, kernel=kernel, noise_candidate="add")


# Static negatives.


def made_up(count: int, scores: tuple[float | None, ...] = ()) -> list[TokenizedGroup]:
    return [
        TokenizedGroup(
            row_id=f"r{number}",
            prompt_ids=(5,),
            candidate_ids=tuple((10 + column, 3) for column in range(5)),
            scores=scores,
        )
        for number in range(count)
    ]


def drawn(groups: tuple[TokenizedGroup, ...]) -> list[tuple[int, ...]]:
    return [tuple(ids[0] - 10 for ids in group.candidate_ids) for group in groups]


def test_a_static_negative_is_drawn_uniformly_by_seed_and_row_id_alone() -> None:
    groups = made_up(4000)
    first = drawn(fix_negatives(groups, STATIC, 0))
    assert {len(columns) for columns in first} == {2}
    assert {columns[0] for columns in first} == {0}
    counted = Counter(columns[1] for columns in first)
    assert sorted(counted) == [1, 2, 3, 4]
    assert sum((count - 1000) ** 2 / 1000 for count in counted.values()) < 30.66
    assert drawn(fix_negatives(groups[::-1], STATIC, 0)) == first[::-1]
    assert drawn(fix_negatives(groups[7:8], STATIC, 0)) == first[7:8]
    assert drawn(fix_negatives(groups, STATIC, 1)) != first
    assert all(group.columns == () for group in fix_negatives(groups, STATIC, 0))


def test_several_static_negatives_are_distinct_and_a_small_pool_yields_all() -> None:
    two = KernelConfig(sampling="static", strategy="random", num_negatives=2)
    assert all(len(set(columns)) == 3 for columns in drawn(fix_negatives(made_up(50), two, 0)))
    many = KernelConfig(sampling="static", strategy="random", num_negatives=9)
    assert {tuple(sorted(each)) for each in drawn(fix_negatives(made_up(9), many, 0))} == {
        (0, 1, 2, 3, 4)
    }


@pytest.mark.parametrize(("strategy", "column"), [("max", 3), ("min", 1)])
def test_scores_of_the_rows_choose_a_static_negative(strategy: str, column: int) -> None:
    """The pair of the best and the best, or worst, of the pool, as baselines have it."""
    groups = made_up(3, scores=(None, 0.1, 0.4, 0.9, 0.5))
    config = KernelConfig(
        sampling="static",
        strategy=strategy,  # pyright: ignore[reportArgumentType]
        score="external",
    )
    fixed = fix_negatives(groups, config, 0)
    assert drawn(fixed) == [(0, column)] * 3
    assert [group.scores[0] for group in fixed] == [None] * 3


def test_draws_by_external_scores_are_in_proportion_to_exp_gamma_reward() -> None:
    """HPS, with gamma = 2: a temperature of one half."""
    scores = (None, 0.1, 0.4, 0.9, 0.5)
    config = KernelConfig(sampling="static", score="external", temperature=0.5)
    fixed = fix_negatives(made_up(4000, scores), config, 0)
    counted = Counter(columns[1] for columns in drawn(fixed))
    weights = [math.exp(2 * score) for score in scores if score is not None]
    expected = [4000 * weight / sum(weights) for weight in weights]
    observed = [counted[column] for column in range(1, 5)]
    chi_squared = sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True))
    assert chi_squared < 30.66
