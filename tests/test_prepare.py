"""Composing rows and tokens for a run: options that reach the tokens, and rows on both sides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import build_tokenizer, candidate_lines, write_jsonl
from transformers import PreTrainedTokenizerBase

from mcpo.config import DataConfig
from mcpo.data.mixture import parse_source
from mcpo.prepare import Groups, load_groups


def load(
    tokenizer: PreTrainedTokenizerBase, train: Path, held_out: Path | None = None, **options: Any
) -> Groups:
    config = DataConfig(
        train_data=(parse_source(str(train)),),
        eval_data=(parse_source(str(held_out)),) if held_out else (),
        **options,
    )
    return load_groups(config, tokenizer, seed=0)


def without_ids(rows: list[dict[str, object]]) -> list[dict[str, object]]:
    return [{key: value for key, value in row.items() if key != "id"} for row in rows]


def test_files_of_one_name_may_be_trained_on_and_held_out(
    tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    for folder, seed in (("a", 0), ("b", 1)):
        (tmp_path / folder).mkdir()
        rows = without_ids(candidate_lines(4, seed=seed))
        write_jsonl(tmp_path / folder / "train.jsonl", rows)
    groups = load(tiny_tokenizer, tmp_path / "a" / "train.jsonl", tmp_path / "b" / "train.jsonl")
    assert (len(groups.train), len(groups.held_out)) == (4, 4)


def test_equal_ids_are_refused(
    tiny_tokenizer: PreTrainedTokenizerBase, candidates_file: Path
) -> None:
    with pytest.raises(ValueError, match=r"got the same ids in train_data .* \['row-0', 'row-1', "):
        load(tiny_tokenizer, candidates_file, candidates_file)


def test_a_held_out_row_that_is_trained_on_under_another_id_is_refused(
    tiny_tokenizer: PreTrainedTokenizerBase, candidates_file: Path, tmp_path: Path
) -> None:
    held_out = candidate_lines(14, seed=0, prefix="copy")[2:3] + candidate_lines(
        2, seed=9, prefix="own"
    )
    path = write_jsonl(tmp_path / "held.jsonl", held_out)
    message = "same prompt and chosen completion .*, 1 times: 'row-2' and 'copy-2'; drop them"
    with pytest.raises(ValueError, match=message):
        load(tiny_tokenizer, candidates_file, path)


def test_one_prompt_with_another_answer_may_be_held_out(
    tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    rows: list[dict[str, object]] = [
        {"id": word, "prompt": "w1 w2", "chosen": word, "rejected": "w9"} for word in ("w3", "w4")
    ]
    train = write_jsonl(tmp_path / "train.jsonl", rows[:1])
    held_out = write_jsonl(tmp_path / "held.jsonl", rows[1:])
    assert len(load(tiny_tokenizer, train, held_out).held_out) == 1


SHOUTING = (
    "{% for m in messages %}{{ 'w0 w0 w0 ' + m['content'] + ' <|im_end|> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'w1 ' }}{% endif %}"
)


def test_a_chat_template_takes_the_place_of_the_tokenizers_own(
    candidates_file: Path, tmp_path: Path
) -> None:
    path = tmp_path / "chat.jinja"
    path.write_text(SHOUTING)
    tokenizer = build_tokenizer()
    groups = load(tokenizer, candidates_file, chat_template=str(path))
    begin = tuple(tokenizer.convert_tokens_to_ids(["w0", "w0", "w0"]))
    assert all(group.prompt_ids[:3] == begin for group in groups.train)
    assert tokenizer.chat_template == SHOUTING


def test_a_chat_template_that_cannot_be_read_is_named(
    tiny_tokenizer: PreTrainedTokenizerBase, candidates_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(FileNotFoundError, match=r"chat_template must name a file .*, got 'gone"):
        load(tiny_tokenizer, candidates_file, chat_template="gone.jinja")
    path = tmp_path / "chat.jinja"
    path.write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"chat_template must be a text file .*chat\.jinja"):
        load(tiny_tokenizer, candidates_file, chat_template=str(path))


def test_the_prompt_limit_reaches_the_tokens(
    tiny_tokenizer: PreTrainedTokenizerBase, candidates_file: Path
) -> None:
    limits = {"max_prompt_length": 5, "too_long": "truncate_prompt"}
    groups = load(tiny_tokenizer, candidates_file, **limits)
    assert {len(group.prompt_ids) for group in groups.train} == {5}
    assert "truncated_prompt 14" in groups.report
