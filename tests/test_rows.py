"""Sources: files and datasets, mixtures and subsamples, ids, and what cannot be read."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

from mcpo.data import RowOptions, SourceSpec, load_rows, parse_source
from mcpo.findings import counts, describe


def pair(name):
    return {"id": name, "prompt": f"q {name}", "chosen": f"yes {name}", "rejected": f"no {name}"}


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write(path, content):
    path.write_bytes(content)
    return str(path)


def ids(report):
    return [row.row_id for row in report.rows]


@pytest.fixture
def hundred(tmp_path):
    return write(tmp_path / "hundred.jsonl", lines(*(pair(str(i)) for i in range(100))))


def as_parquet(path, rows):
    from pyarrow import Table
    from pyarrow.parquet import write_table

    write_table(Table.from_pylist(rows), path)


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "json", "parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, ending):
    rows = [pair("a"), pair("b")]
    path = tmp_path / f"rows.{ending}"
    if ending == "parquet":
        as_parquet(path, rows)
    else:
        content = json.dumps(rows).encode() if ending == "json" else lines(*rows)
        write(path, gzip.compress(content) if ending.endswith("gz") else content)
    report = load_rows([str(path)])
    assert ids(report) == ["a", "b"]
    assert [r.text for r in report.rows[1].candidates] == ["yes b", "no b"]
    assert report.findings == ()


def test_a_parquet_file_with_lists_of_structs_is_read(tmp_path):
    completions = [{"text": "b", "rank": 2}, {"text": "a", "rank": 1}]
    as_parquet(tmp_path / "rows.parquet", [{"prompt": "q", "completions": completions}])
    (row,) = load_rows([str(tmp_path / "rows.parquet")]).rows
    assert row.row_id == f"{tmp_path}/rows.parquet:1"
    assert [one.text for one in row.candidates] == ["a", "b"]


@pytest.fixture
def offline_datasets(tmp_path, monkeypatch):
    """Nothing is fetched, and what datasets caches goes away with the test."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def test_a_dataset_is_read_by_name_and_split(tmp_path, offline_datasets):
    folder = tmp_path / "pairs"
    folder.mkdir()
    write(folder / "train.jsonl", lines(pair("a"), pair("b"), pair("c")))
    write(folder / "test.jsonl", lines({key: v for key, v in pair("t").items() if key != "id"}))
    train = SourceSpec(path=str(folder), max_rows=2)
    report = load_rows([train, f"{folder}:test"])
    assert len(report.rows) == 3
    assert set(ids(report)[:2]) < {"a", "b", "c"}
    assert ids(report)[2] == f"{folder}:test:1"
    assert report.rows[2].chosen.text == "yes t"


def test_a_dataset_that_is_not_there_is_named(offline_datasets):
    with pytest.raises(FileNotFoundError, match=r"'no-one/nothing' is no file .* split 'test' of"):
        load_rows(["no-one/nothing:test"])


@pytest.mark.parametrize(
    ("text", "path", "split"),
    [
        ("berkeley-nest/Nectar", "berkeley-nest/Nectar", None),
        ("berkeley-nest/Nectar:validation", "berkeley-nest/Nectar", "validation"),
        ("a:b/rows.jsonl", "a:b/rows.jsonl", None),
    ],
)
def test_a_source_is_written_as_one_string(text, path, split):
    assert parse_source(text) == SourceSpec(path=path, split=split)


def test_a_mixture_holds_its_sources_in_order_each_in_its_schema(tmp_path):
    ranked = {"prompt": "q", "completions": [{"text": "a", "score": 2}, {"text": "b", "score": 3}]}
    one = write(tmp_path / "one.jsonl", lines(pair("a"), pair("b")))
    two = write(tmp_path / "two.jsonl", lines(ranked))
    report = load_rows([two, SourceSpec(path=one)])
    assert ids(report) == [f"{two}:1", "a", "b"]
    assert report.rows[0].chosen.text == "b"


def test_subsamples_are_drawn_by_seed_and_keep_the_order(hundred):
    spec = SourceSpec(path=hundred, fraction=0.3)
    first = [int(i) for i in ids(load_rows([spec], seed=1))]
    assert len(first) == 30
    assert first == sorted(first)
    assert first == [int(i) for i in ids(load_rows([spec], seed=1))]
    assert first != [int(i) for i in ids(load_rows([spec], seed=2))]
    assert max(first) > 50


def test_the_smaller_limit_counts_and_one_row_is_left(hundred):
    def size(**limits):
        return len(load_rows([SourceSpec(path=hundred, **limits)]).rows)

    assert size(max_rows=7) == 7
    assert size(max_rows=200) == 100
    assert size(fraction=0.5, max_rows=20) == 20
    assert size(fraction=0.1, max_rows=20) == 10
    assert size(fraction=0.001) == 1


def test_ids_come_from_the_column_or_from_path_and_line(tmp_path):
    bare = {key: value for key, value in pair("x").items() if key != "id"}
    numbered = {**pair("y"), "id": 7}
    path = write(tmp_path / "some.jsonl", lines(bare) + b"\n" + lines(numbered) + lines(bare))
    assert ids(load_rows([path])) == [f"{path}:1", "7", f"{path}:4"]


def test_files_of_one_name_in_two_folders_do_not_share_ids(tmp_path, monkeypatch):
    bare = {key: value for key, value in pair("x").items() if key != "id"}
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "train.jsonl", lines(bare))
    monkeypatch.chdir(tmp_path)
    report = load_rows(["a/train.jsonl", "b/train.jsonl"])
    assert ids(report) == ["a/train.jsonl:1", "b/train.jsonl:1"]
    assert report.findings == ()


def test_splits_of_one_dataset_do_not_share_ids(tmp_path, offline_datasets):
    folder = tmp_path / "pairs"
    folder.mkdir()
    for split in ("train", "test"):
        bare = {key: value for key, value in pair(split).items() if key != "id"}
        write(folder / f"{split}.jsonl", lines(bare))
    report = load_rows([str(folder), f"{folder}:test"])
    assert ids(report) == [f"{folder}:train:1", f"{folder}:test:1"]


def test_an_id_that_is_taken_gets_a_number_and_is_counted(tmp_path):
    path = write(tmp_path / "rows.jsonl", lines(pair("a"), pair("a"), pair("a#2"), pair("a")))
    report = load_rows([path])
    assert ids(report) == ["a", "a#2", "a#2#2", "a#3"]
    assert counts(report.findings) == {"duplicate_id": 3}


def test_extra_keys_are_ignored(tmp_path):
    path = write(tmp_path / "rows.jsonl", lines({**pair("a"), "checks": [{"any": 1}]}))
    assert ids(load_rows([path])) == ["a"]


BROKEN = lines(pair("a")) + b'{"prompt": \n' + lines({**pair("b"), "chosen": None}, pair("c"))


def test_bad_rows_stop_the_run_or_are_counted_with_their_reason(tmp_path):
    path = write(tmp_path / "rows.jsonl", BROKEN)
    with pytest.raises(ValueError, match=r"rows\.jsonl line 2 is not valid JSON.*bad_rows='drop'"):
        load_rows([path])
    report = load_rows([path], options=RowOptions(bad_rows="drop"))
    assert ids(report) == ["a", "c"]
    (finding,) = report.findings
    assert (finding.kind, finding.count) == ("bad_row", 2)
    assert "line 2 is not valid JSON" in finding.examples[0]
    assert "line 3: column 'chosen' must be text" in finding.examples[1]


SURROGATES = [
    ({"id": "a\ud83d"}, r"line 2: column 'id' must be text without .*, got str 'a\\ud83d'"),
    ({"prompt": "q \ud83d"}, r"line 2: column 'prompt' must be text without lone surrogates .half"),
    ({"chosen": "\ude00"}, "line 2: column 'chosen' must be text without lone surrogates"),
    ({"rejected": ["no", "\ude00"]}, r"line 2: column 'rejected\[1\]' must be text without lone"),
    (
        {"prompt": [{"role": "user", "content": "\ud83d"}]},
        r"line 2, prompt\[0\]: column 'content' must be text without lone surrogates",
    ),
    ({"score_chosen": 10**400}, "line 2: column 'score_chosen' must be a finite number"),
]


@pytest.mark.parametrize(("change", "message"), SURROGATES)
def test_what_json_can_spell_and_nothing_can_encode_is_a_bad_row(tmp_path, change, message):
    path = write(tmp_path / "rows.jsonl", lines(pair("a"), {**pair("b"), **change}))
    with pytest.raises(ValueError, match=message):
        load_rows([path])
    report = load_rows([path], options=RowOptions(bad_rows="drop"))
    assert ids(report) == ["a"]
    assert counts(report.findings) == {"bad_row": 1}
    describe(report.findings).encode()


def test_a_surrogate_pair_is_text(tmp_path):
    path = write(tmp_path / "rows.jsonl", lines({**pair("a"), "chosen": "\U0001f600"}))
    assert b"\\ud83d\\ude00" in Path(path).read_bytes()
    assert load_rows([path]).rows[0].chosen.text == "\U0001f600"


def test_a_broken_line_outside_the_subsample_does_not_matter(tmp_path, hundred):
    whole = SourceSpec(path=hundred, max_rows=3)
    taken = {int(i) for i in ids(load_rows([whole]))}
    broken = [b"{" if i not in taken else lines(pair(str(i))).strip() for i in range(100)]
    path = write(tmp_path / "broken.jsonl", b"\n".join(broken))
    assert len(load_rows([SourceSpec(path=path, max_rows=3)]).rows) == 3


def test_columns_that_fit_no_schema_stop_the_run_even_when_bad_rows_are_dropped(tmp_path):
    path = write(tmp_path / "rows.jsonl", lines({"question": "q", "answer": "a"}))
    message = (
        "line 1: columns question, answer fit no schema: candidates needs prompt, completions; "
        "nectar needs prompt, answers; ultrafeedback needs instruction, completions; "
        "preference needs chosen, rejected"
    )
    with pytest.raises(ValueError, match=message):
        load_rows([path], options=RowOptions(bad_rows="drop"))


def test_columns_that_fit_two_schemas_must_be_told_apart(tmp_path):
    row = {**pair("a"), "completions": [{"text": "x", "rank": 1}, {"text": "y", "rank": 2}]}
    path = write(tmp_path / "rows.jsonl", lines(row))
    with pytest.raises(ValueError, match="fit the schemas candidates and preference; set schema"):
        load_rows([path])
    (got,) = load_rows([SourceSpec(path=path, schema="preference")]).rows
    assert got.chosen.text == "yes a"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", b"", r"rows\.jsonl holds no rows"),
        ("rows.jsonl", b"[1]\n", r"rows\.jsonl line 1 must hold one JSON object, got list"),
        ("rows.jsonl", b'{"id": "\xff"}\n', r"rows\.jsonl line 1 is not valid JSON: .*utf-8"),
        ("rows.jsonl.gz", b"plain", r"rows\.jsonl\.gz cannot be unpacked as gzip"),
        ("rows.jsonl.gz", gzip.compress(b"{}")[:-9], r"rows\.jsonl\.gz cannot be unpacked"),
        ("rows.json", b'{"a": 1}', r"rows\.json must hold a list of rows, got dict"),
        ("rows.json", b"{}\n{}", r"rows\.json is not valid JSON: .* must end in \.jsonl"),
        ("rows.jsonl", b"[" * 100_000, r"rows\.jsonl line 1 is not valid JSON: maximum recursion"),
        ("rows.json", b"[" * 100_000, r"rows\.json is not valid JSON: maximum recursion"),
        ("rows.json", b"[3]", r"rows\.json row 1 must hold one JSON object, got int"),
        ("rows.parquet", b"none", r"rows\.parquet cannot be read as parquet"),
        ("rows.csv", b"a,b", r"rows\.csv must end in \.jsonl, \.jsonl\.gz, \.json, \.parquet"),
        (
            "rows.jsonl",
            lines({**pair("a"), "rejected": "yes a"}),
            r"no row is left of .*rows\.jsonl: empty_pool 1 \(row a\), repeated_completion 1",
        ),
    ],
)
def test_a_file_that_cannot_be_used_says_why(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        load_rows([write(tmp_path / name, content)])


def test_a_missing_file_is_named_with_the_folder_it_was_looked_for_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=rf"no file gone\.jsonl \(looked from {tmp_path}\)"):
        load_rows(["gone.jsonl"])


def test_no_sources_is_no_run():
    with pytest.raises(ValueError, match="no row is left of no sources"):
        load_rows([])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"fraction": 0}, r"x\.jsonl: fraction must be in \(0, 1\], got 0"),
        ({"fraction": 1.5}, r"fraction must be in \(0, 1\], got 1.5"),
        ({"max_rows": 0}, "max_rows must be a whole number of at least 1, got 0"),
        ({"max_rows": "3"}, r"x\.jsonl: max_rows must be a whole number of at least 1, got '3'"),
        ({"max_rows": True}, "max_rows must be a whole number of at least 1, got True"),
        ({"fraction": "half"}, r"fraction must be in \(0, 1\], got 'half'"),
        ({"schema": ["nectar"]}, r"schema must be 'auto' or one of .*, got \['nectar'\]"),
        ({"split": 5}, "split must be the name of one, got 5"),
        ({"split": ""}, "split must be the name of one, got ''"),
        ({"path": 5}, "path of a source must name a file or dataset, got 5"),
        ({"path": ""}, "path of a source must name a file or dataset, got ''"),
        ({"schema": "dpo"}, "schema must be 'auto' or one of candidates, .* got 'dpo'"),
        ({"split": "test"}, "split belongs to Hugging Face datasets .* got 'test'"),
    ],
)
def test_source_values_are_checked(spec, message):
    with pytest.raises(ValueError, match=message):
        SourceSpec(**{"path": "x.jsonl", **spec})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score_field": "score"}, "score_field must be one of .* got 'score'"),
        ({"ties": "first"}, "ties must be one of .* got 'first'"),
        ({"bad_rows": "ignore"}, r"bad_rows must be one of \('error', 'drop'\), got 'ignore'"),
    ],
)
def test_option_values_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        RowOptions(**options)


def test_reading_rows_imports_neither_torch_nor_transformers():
    code = (
        "import sys, mcpo.data, mcpo.tokens\n"
        "assert not {'torch', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])
