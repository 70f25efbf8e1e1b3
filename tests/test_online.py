"""OnMC-PO on a tiny model: segments, what each leaves, stopping and going on, refusals."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import torchrun, weights, words, write_jsonl
from judge_server import Reply, judge_server

from mcpo import loop
from mcpo.data.rows import load_rows
from mcpo.judges.tournament import Group
from mcpo.loop import Segment
from mcpo.metrics import read_metrics
from mcpo.online import local
from mcpo.online.__main__ import main
from mcpo.online.plan import Prompt
from mcpo.online.rows import by_scores, by_tournament, text_of
from mcpo.online.segments import cut_into_segments, prompts_of
from mcpo.records import Candidate
from mcpo.train import main as train

# parts


def test_segments_cover_a_run_and_differ_by_a_step() -> None:
    parts = cut_into_segments(10, 3)
    assert [(part.start, part.stop) for part in parts] == [(0, 3), (3, 6), (6, 10)]
    assert [part.number for part in parts] == [0, 1, 2]


def test_prompts_go_on_where_the_segment_before_ended() -> None:
    first, second = cut_into_segments(6, 2)
    asked = [
        prompts_of(range(20), part, groups_per_step=3, seed=0, limit=None)
        for part in (first, second)
    ]
    assert len(asked[0]) == len(asked[1]) == 9
    assert set(asked[0]).isdisjoint(asked[1])
    # More groups than prompts: each is asked once.
    assert sorted(prompts_of(range(4), first, groups_per_step=3, seed=0, limit=None)) == [*range(4)]
    assert len(prompts_of(range(20), second, groups_per_step=3, seed=0, limit=5)) == 5


def answers(*texts: str) -> list[Candidate]:
    return [Candidate(text=text) for text in texts]


PROMPTS = [Prompt(row_id=f"p{number}", prompt=f"w{number}") for number in range(4)]


class Length:
    def score(self, groups: list[Group]) -> list[list[float]]:
        return [[float(len(answer.text)) for answer in group.answers] for group in groups]


def test_scores_make_rows_best_first_with_equal_ranks_for_equals() -> None:
    groups = [
        answers("w1", "w1 w2", "", "w3 w4", "w1"),
        answers("w1", "w1"),
        answers("w1", "w2"),
        answers("", "w1"),
    ]
    result = by_scores(PROMPTS, groups, Length())
    assert (len(result.rows), result.too_few, result.undecided) == (1, 2, 1)
    row = result.rows[0]
    assert (row["id"], row["prompt"]) == ("p0", "w0")
    assert [(each["text"], each["rank"], each["score"]) for each in row["completions"]] == [
        ("w1 w2", 1, 5.0),
        ("w3 w4", 1, 5.0),
        ("w1", 2, 2.0),
    ]


def test_a_tournaments_row_has_its_winner_first_and_no_equal_in_its_pool(tmp_path: Path) -> None:
    from mcpo.judges.verdict import Verdict

    class Scripted:
        """By the number in the answers; within 1 is a tie."""

        def compare(self, pairs, on_verdict=lambda _: None):
            gaps = [float(pair.first) - float(pair.second) for pair in pairs]
            return [
                Verdict.TIE if abs(gap) <= 1 else Verdict.FIRST if gap > 0 else Verdict.SECOND
                for gap in gaps
            ]

    groups = [answers("1", "5", "5.5", "2"), answers("1", "1.5"), answers("5", "5.5", "1")]
    result = by_tournament(PROMPTS[:3], groups, Scripted())
    assert (len(result.rows), result.undecided) == (2, 1)
    (loaded,) = load_rows([str(write_jsonl(tmp_path / "rows.jsonl", [result.rows[0]]))]).rows
    assert loaded.chosen.text == "5"
    assert [each.text for each in loaded.pool] == ["1", "2"]


def test_a_judge_reads_a_conversation_with_its_roles() -> None:
    talk = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"})
    assert text_of(Prompt(row_id="1", prompt=talk)) == "system: Be brief.\n\nuser: Why?"


# runs


@pytest.fixture
def options(arguments: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    rows = [{"id": f"p{n}", "prompt": f"w{n} w{n + 1} w{n + 2}"} for n in range(12)]
    chosen = {name: arguments[name] for name in arguments if name != "train_data"}
    return chosen | {
        "prompts": write_jsonl(tmp_path / "prompts.jsonl", rows),
        "judge": "reward",
        "reward": "online_reward:words",
        "segments": 2,
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "max_new_tokens": 6,
        "generation_batch_size": 3,
    }


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_trains_on_answers_of_the_policy_as_it_is(
    options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(options)) == 0
    text = capsys.readouterr().out
    assert "segment 1 of 2: steps 0 to 2" in text
    assert re.search(r"24 answers to 4 prompts: \d+ cut at max_new_tokens", text)
    folder = options["output_dir"]
    metrics = read_metrics(folder / "metrics.jsonl")
    assert [line["step"] for line in metrics] == [1, 2, 3, 4]
    # One schedule over the whole run.
    rates = [line["learning_rate"] for line in metrics]
    assert rates[1:] == sorted(rates[1:], reverse=True)
    assert (folder / "model").is_dir()
    assert (folder / "summary.json").exists()
    rows = [lines_of(folder / "segments" / part / "candidates.jsonl") for part in "01"]
    makers = [{c["model"] for row in part for c in row["completions"]} for part in rows]
    assert makers == [{options["model_name_or_path"].name}, {"policy-2"}]
    assert {row["id"] for row in rows[0]}.isdisjoint(row["id"] for row in rows[1])
    # What the first segment trained on is not what an untrained policy would answer in the second.
    assert load_rows([str(folder / "segments" / "1" / "candidates.jsonl")]).rows


def test_one_segment_is_the_offline_run_on_its_rows(
    options: dict[str, Any], arguments: dict[str, Any], tmp_path: Path
) -> None:
    assert main(words(options | {"segments": 1})) == 0
    rows = options["output_dir"] / "segments" / "0" / "candidates.jsonl"
    again = {name: options[name] for name in arguments if name in options}
    again |= {"train_data": rows, "max_steps": 4, "per_device_train_batch_size": 2}
    again |= {"output_dir": tmp_path / "offline"}
    assert train(words(again)) == 0
    online, offline = weights(options["output_dir"]), weights(tmp_path / "offline")
    assert all(torch.equal(online[name], offline[name]) for name in online)


def assert_same_run(first: Path, second: Path) -> None:
    one, two = weights(first), weights(second)
    assert all(torch.equal(one[name], two[name]) for name in one)
    losses = [[line["loss"] for line in read_metrics(f / "metrics.jsonl")] for f in (first, second)]
    assert losses[0] == losses[1]
    for part in "01":
        names = [folder / "segments" / part / "candidates.jsonl" for folder in (first, second)]
        assert names[0].read_text() == names[1].read_text()


@pytest.fixture
def undisturbed(options: dict[str, Any], tmp_path: Path) -> Path:
    whole = options | {"output_dir": tmp_path / "whole"}
    assert main(words(whole)) == 0
    return tmp_path / "whole"


def test_a_run_stopped_in_training_goes_on(
    options: dict[str, Any], undisturbed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps, original = 0, loop.train_step

    def step_then_signal(*args: Any) -> dict[str, float]:
        nonlocal steps
        steps += 1
        if steps == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", step_then_signal)
        assert main(words(options)) == 0
    assert "interrupted after step 3 of 4" in capsys.readouterr().out
    assert main(words(options)) == 2
    assert "give --resume to continue that run" in capsys.readouterr().err
    assert main([*words(options), "--resume"]) == 0
    assert_same_run(undisturbed, options["output_dir"])


@pytest.mark.parametrize("batches", [1, 2, 3])
def test_a_run_stopped_while_it_generates_goes_on(
    options: dict[str, Any], undisturbed: Path, batches: int
) -> None:
    done, original = 0, local.generate_batch

    def batch_then_stop(*args: Any, **kwargs: Any) -> Any:
        nonlocal done
        done += 1
        # A segment has 4 prompts in 2 batches: the first of it, its second, the next segment's.
        if done == batches:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local, "generate_batch", batch_then_stop)
        with pytest.raises(KeyboardInterrupt):
            main(words(options))
    assert main([*words(options), "--resume"]) == 0
    assert_same_run(undisturbed, options["output_dir"])


def test_a_finished_run_is_left_alone(
    options: dict[str, Any], undisturbed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (undisturbed / "model" / "model.safetensors").stat().st_mtime_ns
    assert main([*words(options | {"output_dir": undisturbed}), "--resume"]) == 0
    assert (undisturbed / "model" / "model.safetensors").stat().st_mtime_ns == before


def test_an_unfinished_segment_refuses_another_plan(
    options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local, "generate_batch", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main(words(options))
    changed = options | {"max_new_tokens": 7, "samples_per_temperature": 1}
    assert main([*words(changed), "--resume"]) == 2
    error = capsys.readouterr().err
    assert "goes on as it began" in error
    assert "samples_per_temperature, max_new_tokens" in error


def test_a_language_model_judges_by_tournament(
    options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    def longer(message: str, before: int) -> Reply:
        found = re.search(r"ANSWER A\n(.*)\nANSWER A.*ANSWER B\n(.*)\nANSWER B", message, re.S)
        return Reply(text="[[A]]" if len(found[1]) > len(found[2]) else "[[B]]")

    with judge_server(longer) as server:
        judge = {"judge": "llm", "judge_model": "j", "judge_base_url": server.base_url}
        given = {name: value for name, value in options.items() if name != "reward"}
        assert main(words(given | judge | {"segments": 1, "max_steps": 1})) == 0
        asked = len(server.requests)
    assert f"judge: {asked} requests" in capsys.readouterr().out
    for row in lines_of(options["output_dir"] / "segments" / "0" / "candidates.jsonl"):
        lengths = [len(each["text"]) for each in row["completions"]]
        assert lengths[0] == max(lengths)
        ranks = [each["rank"] for each in row["completions"]]
        # Its equals, which it did not beat, are first too.
        assert all(
            length == lengths[0] for length, rank in zip(lengths, ranks, strict=True) if rank == 1
        )
        assert 2 in ranks


def test_a_judge_that_fails_loses_nothing(
    options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with judge_server(lambda message, before: Reply(status=401)) as server:
        judge = {"judge": "llm", "judge_model": "j", "judge_base_url": server.base_url}
        assert main(words(options | judge)) == 2
    assert "j refuses every request" in capsys.readouterr().err
    folder = options["output_dir"] / "segments" / "0"
    assert len(lines_of(folder / "samples-0-of-1.jsonl")) == 4
    assert not (folder / "candidates.jsonl").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_steps": -1}, "max_steps must be given, at least one for each segment"),
        ({"max_steps": 1}, "max_steps must be given, at least one for each segment"),
        ({"segments": 0}, "segments must be at least 1, got 0"),
        ({"train_data": "a.jsonl"}, "makes its training rows itself: leave out train_data"),
        ({"prompts": "absent.jsonl"}, "prompts must name a JSONL file, got absent.jsonl"),
        ({"judge": "llm"}, "judge: llm needs judge_model"),
        ({"judge": "verifiable"}, "has no column 'checks'"),
        ({"generator": "server"}, "generator: server needs server_base_url"),
        ({"reward": "online_reward:absent"}, "must name a function"),
        ({"samples_per_temperature": 0}, "samples_per_temperature must be at least 1"),
        ({"segmens": 1}, "unknown option 'segmens' in the command line; did you mean 'segments'"),
    ],
)
def test_what_an_online_run_cannot_be_is_refused(
    options: dict[str, Any],
    change: dict[str, Any],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(words(options | change)) == 2
    assert message in capsys.readouterr().err


def test_a_segment_without_rows_says_so(
    options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    one = {"temperatures": 0, "samples_per_temperature": 1}
    assert main(words(options | one)) == 2
    assert "needs a prompt whose answers the judge tells apart, got none of 4" in (
        capsys.readouterr().err
    )


@pytest.mark.slow
def test_two_processes_share_a_run(options: dict[str, Any]) -> None:
    two = options | {"per_device_train_batch_size": 1, "reward": "tests.online_reward:words"}
    torchrun(two, 2, job="-m mcpo.online")
    folder = options["output_dir"]
    assert (folder / "model").is_dir()
    share = [folder / "segments" / "1" / f"samples-{rank}-of-2.jsonl" for rank in (0, 1)]
    assert [len(lines_of(path)) for path in share] == [2, 2]
    assert isinstance(cut_into_segments(4, 2)[1], Segment)
