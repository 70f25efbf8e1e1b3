"""The maker, with the model replaced by canned answers: resuming, files, report."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from mcpo.data import make_verifiable
from mcpo.data.make_verifiable import draw_seed, fingerprint, limited, main, read_work, sample_all
from mcpo.data.prompts import build_prompts, read_topics
from mcpo.data.verifiable_report import BEGIN, END, insert_figures
from mcpo.data.verifiable_rows import Sample


@pytest.fixture
def answered(monkeypatch):
    """Answer without a model; the list tells which prompts were answered."""
    asked = []

    def fake_batches(batches, *, model_name, seed):
        for batch in batches:
            asked.extend(prompt.prompt_id for prompt in batch)
            yield {prompt.prompt_id: canned_samples(prompt.prompt_id) for prompt in batch}

    monkeypatch.setattr(make_verifiable, "_sample_batches", fake_batches)
    return asked


def canned_samples(prompt_id):
    texts = ["No one knows", "In 1969, it was warm.", "Is it so?", "Well, well, well. Yes. No."]
    return [
        Sample(text=f"{text} {prompt_id}?", temperature=0.4, index=i, finished=i < 3, num_tokens=9)
        for i, text in enumerate(texts)
    ]


def run(tmp_path, *more):
    main(["--output", str(tmp_path / "out"), "--work", str(tmp_path / "work"), *more])


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_main_writes_every_file_and_prints_the_report(tmp_path, answered, capsys):
    run(tmp_path, "--limit", "30")
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {
        "verifiable_train.jsonl",
        "verifiable_validation.jsonl",
        "verifiable_heldout.jsonl",
        "verifiable_validation_prompts.jsonl",
        "verifiable_heldout_prompts.jsonl",
    }
    rows = read_jsonl(out / "verifiable_train.jsonl")
    assert 0 < len(rows) < 30
    for row in rows:
        scores = [completion["score"] for completion in row["completions"]]
        assert scores[0] == 1 > scores[-1]
        assert scores == sorted(scores, reverse=True)
    assert len(read_jsonl(out / "verifiable_heldout_prompts.jsonl")) == 30
    printed = capsys.readouterr().out
    assert f"| train | 30 | {len(rows)} |" in printed
    assert "the others 9.0; the model ended 75.0% itself." in printed
    assert "360 completions; those that pass every check have 9.0 tokens on average" in printed


def test_readme_gets_the_figures(tmp_path, answered):
    readme = tmp_path / "out" / "README.md"
    readme.parent.mkdir()
    readme.write_text(f"# Title\n{BEGIN}\nold\n{END}\nEnd\n")
    run(tmp_path, "--limit", "2")
    text = readme.read_text()
    assert text.startswith(f"# Title\n{BEGIN}\n\n| split |")
    assert text.endswith(f"{END}\nEnd\n")
    assert "old" not in text


def test_readme_without_marks():
    with pytest.raises(ValueError, match=r"README\.md must hold the marks"):
        insert_figures("no marks here", "report")


def test_second_run_samples_nothing_and_writes_the_same(tmp_path, answered):
    run(tmp_path, "--limit", "5")
    first = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    assert len(answered) == 15
    run(tmp_path, "--limit", "5")
    assert len(answered) == 15
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == first


def test_interrupted_run_goes_on_after_the_last_whole_batch(tmp_path, answered):
    prompts = limited(build_prompts(0, read_topics()), 20)
    whole = sample_all(prompts, model_name="m", seed=0, work_folder=tmp_path)
    (work,) = tmp_path.iterdir()
    lines = work.read_text().splitlines(keepends=True)
    assert len(lines) == 4
    work.write_text("".join(lines[:2]) + lines[2][:50])
    answered.clear()
    again = sample_all(prompts, model_name="m", seed=0, work_folder=tmp_path)
    assert again == whole
    assert len(answered) == 60 - 32
    assert work.read_text().splitlines(keepends=True) == lines


def test_other_settings_never_continue_a_run():
    prompts = limited(build_prompts(0, read_topics()), 3)
    names = {
        fingerprint(prompts, "m", 0),
        fingerprint(prompts, "m", 1),
        fingerprint(prompts, "other", 0),
        fingerprint(prompts[:-1], "m", 0),
    }
    assert len(names) == 4


def test_no_work_yet(tmp_path):
    assert read_work(tmp_path / "missing.jsonl") == {}


def test_every_sample_has_a_seed_of_its_own():
    seeds = {
        draw_seed(seed, prompt_id, temperature, index)
        for seed in (0, 1)
        for prompt_id in ("a", "b")
        for temperature in (0.4, 1.0)
        for index in (0, 1)
    }
    assert len(seeds) == 16
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_limit_must_be_positive():
    with pytest.raises(ValueError, match="--limit must be at least 1; got 0"):
        limited([], 0)


def test_import_is_light():
    code = "import sys, mcpo.data.make_verifiable; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
