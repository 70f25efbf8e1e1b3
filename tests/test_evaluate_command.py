"""``python -m mcpo.evaluate``: tables, exit codes, and the proof on published records."""

import json
import os
import shutil
from pathlib import Path

import pytest
from judge_server import Reply, judge_server

from mcpo.evaluate.__main__ import main
from mcpo.evaluate.alpaca import (
    Annotation,
    ModelOutput,
    preferences,
    read_annotations,
    write_annotations,
    write_outputs,
)
from mcpo.evaluate.arena import Judgment, write_judgments

SHARED = Path(os.environ.get("MCPO_SHARED", Path(__file__).parents[2] / "shared"))
RECORDS = SHARED / "data" / "eval"
needs_records = pytest.mark.skipif(not RECORDS.is_dir(), reason=f"there is no folder {RECORDS}")


def annotations(model, values):
    return [
        Annotation(
            instruction=f"Question {number}",
            output_1="a" * (10 + number % 3),
            generator_1="base",
            output_2="b" * (12 + number % 5),
            generator_2=model,
            annotator="a judge",
            preference=value,
        )
        for number, value in enumerate(values)
    ]


@pytest.fixture
def files(tmp_path):
    write_annotations(tmp_path / "one.json", annotations("one", [0.2, 0.8, 0.5, 1.0]))
    write_annotations(tmp_path / "two.json", annotations("two", [0.4, 0.8, 0.7, 1.0]))
    return tmp_path


def test_alpaca_prints_rates_differences_and_what_they_compare_with(files, capsys):
    assert main(["alpaca", str(files / "one.json"), str(files / "two.json"), "--seeds"]) == 0
    text = capsys.readouterr().out
    assert "62.50" in text
    assert "+10.00" in text
    assert "not comparable with the leaderboard: the judge is a judge" in text
    assert "over 2 seeds, mean (std): 67.50 (7.07)" in text


def test_alpaca_controls_length_with_given_features(files, capsys):
    (files / "difficulty.csv").write_text("index,instruction_difficulty\n1,0\n0,1\n2,0\n3,0\n")
    (files / "gamed.csv").write_text(
        "index,model,preference,std_delta_len,instruction_difficulty,not_gamed_baseline\n"
        "0,v,0.8,-1,0,False\n1,v,0.3,1,0,False\n"
    )
    features = ["--difficulty", str(files / "difficulty.csv"), "--gamed", str(files / "gamed.csv")]
    assert main(["alpaca", str(files / "one.json"), *features]) == 0
    assert main(["alpaca", str(files / "one.json"), *features[:2]]) == 2
    assert "needs both --difficulty and --gamed" in capsys.readouterr().err


def test_other_questions_have_no_paired_difference(files, capsys):
    rows = annotations("three", [0.4, 0.8, 0.7, 1.0])[::-1]
    write_annotations(files / "three.json", rows)
    assert main(["alpaca", str(files / "one.json"), str(files / "three.json")]) == 2
    assert "same questions in one order" in capsys.readouterr().err


def test_arena_prints_scores(tmp_path, capsys):
    rows = [
        Judgment(
            uid=str(number),
            model="ours",
            judge="j",
            baseline="",
            category="",
            baseline_first="A<<B",
            model_first=None if number else "A>B",
        )
        for number in range(3)
    ]
    write_judgments(tmp_path / "ours.jsonl", rows)
    assert main(["arena", str(tmp_path / "ours.jsonl"), "--seeds"]) == 0
    text = capsys.readouterr().out
    assert "100.0" in text
    assert "not said" in text


def test_page_is_written(files, capsys):
    assert main(["page", str(files / "one.json"), str(files / "page.html")]) == 0
    assert "4 questions" in capsys.readouterr().out
    assert (files / "page.html").read_text().startswith("<!doctype html>")


def test_missing_files_are_named(tmp_path, capsys):
    assert main(["alpaca", str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err
    assert main(["published", str(tmp_path)]) == 2
    assert "the records need alpacaeval2_preferences.csv.gz" in capsys.readouterr().err


@needs_records
def test_published_figures_come_out_again(capsys):
    assert main(["published", str(RECORDS)]) == 0
    text = capsys.readouterr().out
    assert "49 entries" in text
    assert "300 recorded answers" in text


@needs_records
def test_a_figure_that_is_off_is_found(tmp_path, capsys):
    folder = tmp_path / "records"
    shutil.copytree(RECORDS, folder, copy_function=shutil.copyfile)
    folder.chmod(0o755)
    path = folder / "alpacaeval2_published.json"
    published = json.loads(path.read_text())
    few = dict(list(published.items())[:3])
    few["FuseChat-Gemma-2-9B-Instruct"]["win_rate"] += 1e-4
    path.write_text(json.dumps(few))
    assert main(["published", str(folder)]) == 1
    assert "OFF: FuseChat-Gemma-2-9B-Instruct" in capsys.readouterr().out


def outputs(generator, texts):
    return [
        ModelOutput(instruction=f"Question {number}", output=text, generator=generator)
        for number, text in enumerate(texts)
    ]


def test_a_judge_fills_an_annotation_file(tmp_path, capsys):
    write_outputs(tmp_path / "mine.json", outputs("mine", ["good", "bad", "good", "odd"]))
    write_outputs(tmp_path / "base.json", outputs("base", ["bad", "good", "bad", "bad"])[::-1])

    def knows(message, before):
        first = message.split("<<<ANSWER A\n")[1].split("\n")[0]
        if "odd" in message:
            return Reply(text="I cannot say.")
        return Reply(text="[[A]]" if first == "good" else "[[B]]")

    files = [str(tmp_path / name) for name in ("mine.json", "base.json", "annotations.json")]
    with judge_server(knows) as server:
        command = ["judge", *files, "--model", "j", "--base_url", server.base_url]
        command += ["--cache", str(tmp_path / "answers.sqlite")]
        assert main(command) == 0
        assert "8 requests, 0 answers from" in " ".join(capsys.readouterr().out.split())
        assert main(command) == 0
        assert len(server.requests) == 8
    annotations = read_annotations(tmp_path / "annotations.json")
    assert preferences(annotations)[:3].tolist() == [1, 0, 1]
    assert preferences(annotations)[3] != preferences(annotations)[3]
    assert {each.annotator for each in annotations} == {"j"}


def test_a_judge_that_fails_leaves_no_annotations(tmp_path, capsys):
    write_outputs(tmp_path / "mine.json", outputs("mine", ["a"]))
    write_outputs(tmp_path / "base.json", outputs("base", ["b"]))
    write_outputs(tmp_path / "more.json", outputs("base", ["b", "c"]))
    out = str(tmp_path / "annotations.json")
    rest = ["--model", "j", "--cache", str(tmp_path / "answers.sqlite")]
    mine, base, more = (str(tmp_path / name) for name in ("mine.json", "base.json", "more.json"))
    with judge_server(lambda message, before: Reply(status=401)) as server:
        assert main(["judge", mine, base, out, *rest, "--base_url", server.base_url]) == 2
    assert "refuses every request" in capsys.readouterr().err
    assert not Path(out).exists()
    assert main(["judge", mine, more, out, *rest]) == 2
    assert "1 are in one of them alone, such as 'Question 1'" in capsys.readouterr().err
